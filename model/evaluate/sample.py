"""Images from a model: one noise an image, a grid in a file, and beside it how it was made."""

import json
from pathlib import Path

import torch

from model.nn import flow
from model.nn.precision import autocast


def sample_images(
    model, dataset, captions, seeds, *, steps=25, guidance=2.0, method="euler", batch=16,
    progress=None,
):  # fmt: skip
    """Samples (n, C, size, size) float32 of captions, image i from seeds[i] alone.

    steps     of the integration; Heun evaluates the model twice a step
    guidance  scale of classifier-free guidance; 1: none
    progress  called with how many integration steps of how many are done
    """
    config, seeds = model.config, list(seeds)
    weight = model.final_proj.weight
    text = dataset.embed(captions)
    done, total = 0, steps * -(-len(seeds) // batch)
    images = []
    for i in range(0, len(seeds), batch):
        shape = (config.channels, config.size, config.size)
        z = flow.initial_noise(seeds[i : i + batch], shape).to(weight.device)
        part = text[i : i + batch].to(weight.device)
        v = flow.guided(_in_dtype(model, weight.dtype), part, dataset.empty, guidance)

        def count(step, of, before=done):
            if progress:
                progress(before + step, total)

        with autocast(config, weight.device):
            images.append(flow.integrate(v, z, steps, config.time_shift, method, count).cpu())
        done += steps
    return torch.cat(images)


def save_grid(images, captions, path, dataset, scale=None, **metadata):
    """A PNG of images in rows of eight, and PATH.json with the captions and how they were made."""
    from PIL import Image

    pixels, kind = dataset.to_rgb(images)
    n, _, height, width = pixels.shape
    columns = min(n, 8)
    rows = -(-n // columns)
    grid = torch.ones(rows * columns, 3, height + 2, width + 2)
    grid[:n, :, 1:-1, 1:-1] = pixels.float()
    grid = grid.view(rows, columns, 3, height + 2, width + 2).permute(0, 3, 1, 4, 2)
    grid = (grid.reshape(rows * (height + 2), columns * (width + 2), 3) * 255).round().byte()
    scale = scale or max(1, 512 // (columns * width))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(grid.numpy())
    image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(path)
    record = {"pixels": kind, "columns": columns, "captions": list(captions), **metadata}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def _in_dtype(model, dtype):
    """The model on inputs of its parameters' dtype."""
    return lambda z, text: model(z.to(dtype), text.to(dtype))
