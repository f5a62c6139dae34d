"""Training data: images or latents with embedded captions.

shapes     synthetic images of coloured shapes, drawn by index
latents    precomputed latents and text embeddings in safetensors files
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from model.config import Config
from model.data.latents import Latents
from model.data.shapes import Shapes


class Dataset(Protocol):
    """Samples by index.

    empty         text (tokens, text_dim) of the empty caption
    fingerprint   description of the data that a checkpoint stores, to detect other data
    """

    empty: Tensor
    fingerprint: str

    def index(self, n: int) -> int:
        """Return the index of the n-th sample of training."""

    def get(self, index: int) -> tuple[Tensor, Tensor]:
        """Return x0 (C, size, size) and text (tokens, text_dim), float32 on the CPU."""

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Return text (n, tokens, text_dim) of captions in words."""

    def captions(self, n: int) -> list[str]:
        """Return n captions to sample from."""

    def to_rgb(self, x: Tensor) -> tuple[Tensor, str]:
        """Return samples x as (B, 3, h, w) in [0, 1], and a description of the conversion."""


def open_dataset(config: Config) -> Dataset:
    """Return the dataset of a configuration; UsageError if it does not fit the model."""
    return Shapes(config) if config.data == "shapes" else Latents(config)
