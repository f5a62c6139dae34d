"""Counter-based random numbers: a stream is identified by its name and has no state to save.

A draw depends only on (seed, purpose, step, sample). It is therefore the same after a resume, in
any order, and for any split of a batch. Philox: Salmon et al., "Parallel random numbers", SC 2011.
"""

from collections.abc import Sequence

import numpy as np
import torch

PURPOSES = ("data", "order", "noise", "time", "drop", "sample", "words")


def stream(seed: int, purpose: str, step: int = 0, sample: int = 0) -> np.random.Generator:
    """Return a generator at the start of a stream."""
    key = [seed, PURPOSES.index(purpose)]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, sample, step]))


def normal(
    seed: int, purpose: str, step: int, samples: Sequence[int], shape: Sequence[int]
) -> torch.Tensor:
    """Return float32 standard normals (len(samples), *shape); row i is the stream of sample i."""
    out = np.empty((len(samples), *shape), np.float32)
    for row, sample in zip(out, samples, strict=True):
        stream(seed, purpose, step, sample).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)


def uniform(seed: int, purpose: str, step: int, samples: Sequence[int]) -> torch.Tensor:
    """Return float64 uniform numbers in [0, 1), one per sample."""
    draws = [stream(seed, purpose, step, sample).random() for sample in samples]
    return torch.tensor(draws, dtype=torch.float64)
