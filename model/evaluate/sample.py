"""Samples of a model, each from its own noise, and their grid in a PNG file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from model.data import Dataset
from model.nn import flow
from model.nn.dit import DiT
from model.nn.precision import autocast

MOST_COLUMNS = 8  # of a grid
GRID_PIXELS = 512  # width to which small grids are enlarged


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler."""

    steps: int = 25  # of the integration; with "heun" each evaluates the model twice
    guidance: float = 2.0  # scale of classifier-free guidance; 1: none
    method: str = "euler"  # or heun
    batch: int = 16  # samples per forward pass, without those for guidance


DEFAULT_SAMPLING = Sampling()


def sample_images(
    model: DiT,
    dataset: Dataset,
    captions: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling = DEFAULT_SAMPLING,
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> Tensor:
    """Return samples (n, C, size, size) float32 of captions; image i depends only on seeds[i].

    progress  called with the number of integration steps taken and their total
    """
    config, weight, s = model.config, model.final_proj.weight, sampling
    shape = (config.channels, config.size, config.size)
    text = dataset.embed(captions)
    total = s.steps * -(-len(seeds) // s.batch)
    images = []
    for number, i in enumerate(range(0, len(seeds), s.batch)):
        z = flow.initial_noise(seeds[i : i + s.batch], shape).to(weight.device)
        part = text[i : i + s.batch].to(weight.device)
        v = flow.guided_velocity(_in_dtype(model, weight.dtype), part, dataset.empty, s.guidance)

        def show(step: int, _: int, before: int = number * s.steps) -> None:
            progress(before + step, total)

        with autocast(config, weight.device):
            images.append(flow.integrate(v, z, s.steps, config.time_shift, s.method, show).cpu())
    return torch.cat(images)


def save_grid(
    images: Tensor, captions: Sequence[str], path: str | Path, dataset: Dataset, **metadata: Any
) -> None:
    """Write a PNG of images in rows of eight, and a JSON file with their captions and metadata."""
    pixels, conversion = dataset.to_rgb(images)
    n, _, height, width = pixels.shape
    columns = min(n, MOST_COLUMNS)
    rows = -(-n // columns)
    grid = torch.ones(rows * columns, 3, height + 2, width + 2)  # a border of one pixel
    grid[:n, :, 1:-1, 1:-1] = pixels.float()
    grid = grid.view(rows, columns, 3, height + 2, width + 2).permute(0, 3, 1, 4, 2)
    grid = (grid.reshape(rows * (height + 2), columns * (width + 2), 3) * 255).round().byte()
    scale = max(1, GRID_PIXELS // (columns * width))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(grid.numpy())
    size = image.width * scale, image.height * scale
    image.resize(size, Image.Resampling.NEAREST).save(path)
    record = {"pixels": conversion, "columns": columns, "captions": list(captions), **metadata}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def _in_dtype(model: DiT, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the model as a function that converts its inputs to a dtype."""
    return lambda z, text: model(z.to(dtype), text.to(dtype))
