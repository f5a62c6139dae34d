"""Random numbers by counter: a stream is named, not continued.

A draw depends on (seed, purpose, step, sample) alone, so it is the same after a resume, in any
order, and however a batch is split. Philox: Salmon et al., "Parallel random numbers", SC 2011.
"""

import numpy as np
import torch

PURPOSES = ("data", "order", "noise", "time", "drop", "sample", "words")


def stream(seed, purpose, step=0, sample=0):
    """A numpy Generator at the start of its stream."""
    key = [seed, PURPOSES.index(purpose)]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, sample, step]))


def normal(seed, purpose, step, samples, shape):
    """Standard normal (len(samples), *shape), float32; row i is sample i's own stream."""
    out = np.empty((len(samples), *shape), np.float32)
    for row, sample in zip(out, samples, strict=True):
        stream(seed, purpose, step, sample).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)


def uniform(seed, purpose, step, samples):
    """Uniform in [0, 1), (len(samples),), float64."""
    draws = [stream(seed, purpose, step, sample).random() for sample in samples]
    return torch.tensor(draws, dtype=torch.float64)
