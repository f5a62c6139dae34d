"""Training data: `open_dataset(config)` gives images or latents with embedded captions.

A dataset has

    get(index)          x0 (C, size, size) float32 and text (tokens, width) float32, CPU tensors
    empty               text of the empty caption
    embed(captions)     text (n, tokens, width) of captions in words
    captions(n)         n captions to sample from
    to_rgb(x)           (B, 3, h, w) in [0, 1] of samples x, and what was done to them
    fingerprint         what a checkpoint remembers of the data
    index(seed, n)      which sample is the n-th of training
"""

from model.data.latents import Latents
from model.data.shapes import Shapes


def open_dataset(config):
    """The dataset that a configuration names; UsageError when it does not fit the model."""
    return {"shapes": Shapes, "latents": Latents}[config.data](config)
