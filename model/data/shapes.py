"""Synthetic images of coloured shapes with captions; endless, and deterministic by index.

    "a red circle at the top left on blue"

There are four attributes, so four text tokens, and 6 x 3 x 9 x 5 = 810 captions. Shapes.recognise
reads the attributes from the pixels, so a sample can be compared with its caption.
"""

import functools
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from model.config import Config, UsageError
from model.rng import stream

COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.80, 0.15),
    "yellow": (0.95, 0.90, 0.10),
    "cyan": (0.10, 0.85, 0.90),
    "magenta": (0.90, 0.10, 0.85),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle")
POSITIONS = {
    "top left": (0, 0), "top": (0, 1), "top right": (0, 2),
    "left": (1, 0), "center": (1, 1), "right": (1, 2),
    "bottom left": (2, 0), "bottom": (2, 1), "bottom right": (2, 2),
}  # fmt: skip
GROUNDS = {
    "black": (0.05, 0.05, 0.05),
    "gray": (0.45, 0.45, 0.45),
    "blue": (0.10, 0.15, 0.80),
    "brown": (0.45, 0.25, 0.10),
    "purple": (0.35, 0.10, 0.50),
}
ATTRIBUTES: dict[str, Iterable[str]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "position": POSITIONS,
    "ground": GROUNDS,
}

CENTRES = (0.21, 0.5, 0.79)  # of rows and columns of positions, in image heights
RADIUS = (0.16, 0.20)  # least and greatest radius of a shape, in image heights
JITTER = 0.03
GRADIENT = 0.15  # maximum change of the ground's brightness from the centre to a side
SUBPIXELS = 4  # per side of a pixel, to compute how much of it a shape covers


class Shapes:
    """RGB images (3, size, size), normalised to mean 0 and variance 1 over the whole set."""

    def __init__(self, config: Config) -> None:
        expected = {"channels": 3, "text_tokens": len(ATTRIBUTES)}
        for name, value in expected.items():
            if getattr(config, name) != value:
                raise UsageError(f"data=shapes needs {name}={value}, got {getattr(config, name)}")
        if config.size < 12:
            raise UsageError(f"data=shapes needs size >= 12, got {config.size}")
        self.size, self.text_dim, self.seed = config.size, config.text_dim, config.seed
        self.mean, self.std = _mean_and_std(self.size)
        self.empty = self._words([""] * len(ATTRIBUTES))
        self.fingerprint = f"shapes, {self.size} pixels"

    def index(self, n: int) -> int:
        """Return the index of the n-th sample of training, n itself."""
        return n

    def get(self, index: int) -> tuple[Tensor, Tensor]:
        attributes, pixels = draw(self.seed, index, self.size)
        return self.from_pixels(pixels), self._words(attributes)

    def from_pixels(self, pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(((pixels - self.mean) / self.std).astype(np.float32))

    def caption(self, index: int) -> str:
        return describe(draw(self.seed, index, self.size)[0])

    def captions(self, n: int) -> list[str]:
        """Return n captions, each different from the previous one in every attribute."""
        tables = [list(values) for values in ATTRIBUTES.values()]
        steps = (1, 1, 2, 3)
        return [
            describe([t[i * s % len(t)] for t, s in zip(tables, steps, strict=True)])
            for i in range(n)
        ]

    def embed(self, captions: Sequence[str]) -> Tensor:
        return torch.stack([self._words(parse(caption)) for caption in captions])

    def to_rgb(self, x: Tensor) -> tuple[Tensor, str]:
        pixels = x.detach().double().cpu() * self.std + self.mean
        return pixels.clamp(0, 1), "pixels"

    def recognise(self, x: Tensor) -> list[list[str]]:
        """Return the four attributes visible in each sample (B, 3, size, size)."""
        pixels = (x.detach().double().cpu() * self.std + self.mean).numpy()
        return [_recognise(image) for image in pixels]

    def _words(self, words: Sequence[str]) -> Tensor:
        """Return embeddings (words, text_dim): random vectors of variance 1, one per word."""
        rows = [_embedding(word, self.text_dim) for word in words]
        return torch.from_numpy(np.stack(rows))


def describe(attributes: Sequence[str]) -> str:
    return "a {} {} at the {} on {}".format(*attributes)


def parse(caption: str) -> list[str]:
    """Return the attributes of a caption; those of the empty caption are empty words."""
    if caption == "":
        return [""] * len(ATTRIBUTES)
    head, _, ground = caption.removeprefix("a ").partition(" on ")
    words, _, position = head.partition(" at the ")
    colour, _, shape = words.partition(" ")
    attributes = [colour, shape, position, ground]
    for (name, known), word in zip(ATTRIBUTES.items(), attributes, strict=True):
        if word not in known:
            raise UsageError(
                f"caption {caption!r}: {name} must be one of {', '.join(known)}, got {word!r}; "
                'captions read "a red circle at the top left on blue"'
            )
    return attributes


def draw(seed: int, index: int, size: int) -> tuple[list[str], np.ndarray]:
    """Return the attributes and pixels (3, size, size) in [0, 1] of sample `index`."""
    random = stream(seed, "data", 0, index)
    tables = [list(values) for values in ATTRIBUTES.values()]
    attributes = [table[random.integers(len(table))] for table in tables]
    radius = random.uniform(*RADIUS)
    dy, dx = random.uniform(-JITTER, JITTER, 2)
    slope = random.uniform(-GRADIENT, GRADIENT, 2)
    return attributes, render(attributes, size, radius, (dy, dx), slope)


def render(
    attributes: Sequence[str],
    size: int,
    radius: float,
    jitter: Sequence[float] = (0, 0),
    slope: Sequence[float] | np.ndarray = (0, 0),
) -> np.ndarray:
    """Return the image (3, size, size) of four attributes.

    jitter   offset of the shape's centre, rows and columns, in image heights
    slope    change of the ground's brightness along rows and columns
    """
    colour, shape, position, ground = attributes
    row, column = POSITIONS[position]
    mask = coverage(shape, size, CENTRES[row] + jitter[0], CENTRES[column] + jitter[1], radius)
    y, x = _pixel_grid(size, 1)
    light = 1 + slope[0] * (2 * y - 1) + slope[1] * (2 * x - 1)
    pixels = np.multiply.outer(GROUNDS[ground], light)
    pixels += mask * (np.reshape(COLOURS[colour], (3, 1, 1)) - pixels)
    return pixels.clip(0, 1)


def coverage(shape: str, size: int, y: float, x: float, radius: float) -> np.ndarray:
    """Return the share of each pixel (size, size) that a shape centred at (y, x) covers."""
    py, px = _pixel_grid(size, SUBPIXELS)
    dy, dx = py - y, px - x
    if shape == "circle":
        inside = dy**2 + dx**2 < radius**2
    elif shape == "square":
        inside = np.maximum(abs(dy), abs(dx)) < 0.9 * radius
    else:  # a triangle that points up, with its centroid at (y, x)
        inside = (dy < 0.7 * radius) & (abs(dx) < (dy + 1.4 * radius) * 0.6)
    return inside.reshape(size, SUBPIXELS, size, SUBPIXELS).mean((1, 3))


@functools.cache
def _pixel_grid(size: int, subpixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the y and x of every subpixel, in image heights."""
    centres = (np.arange(size * subpixels) + 0.5) / (size * subpixels)
    y, x = np.meshgrid(centres, centres, indexing="ij")
    return y, x


@functools.cache
def _mean_and_std(size: int) -> tuple[float, float]:
    """Return the statistics of the pixels of 256 samples of seed 0, used with every seed."""
    pixels = np.stack([draw(0, index, size)[1] for index in range(256)])
    return pixels.mean(), pixels.std()


@functools.cache
def _embedding(word: str, width: int) -> np.ndarray:
    random = stream(zlib.crc32(word.encode()), "words")
    return random.standard_normal(width, dtype=np.float32)


def _nearest(table: Mapping[str, Sequence[float]], colour: np.ndarray) -> str:
    names = list(table)
    distance = [np.abs(np.subtract(table[name], colour)).sum() for name in names]
    return names[int(np.argmin(distance))]


def _recognise(pixels: np.ndarray) -> list[str]:
    """Return the attributes visible in an image (3, size, size).

    The ground is the median of the border, the colour that of the pixels that differ most from it,
    and shape and position those of the template with the least squared error.
    """
    size = pixels.shape[1]
    edges = pixels[:, [0, -1]], pixels[:, :, [0, -1]]
    ground = np.median(np.concatenate([edge.reshape(3, -1) for edge in edges], 1), 1)
    distance = np.abs(pixels - ground[:, None, None]).sum(0)
    strongest = np.argsort(distance, None)[-max(4, size * size // 24) :]
    colour = np.median(pixels.reshape(3, -1)[:, strongest], 1)
    axis = colour - ground
    mask = np.tensordot(axis, pixels - ground[:, None, None], 1) / max(axis @ axis, 1e-9)
    mask = mask.clip(0, 1)
    masks, labels = _templates(size)
    best = int(((masks - mask.ravel()) ** 2).sum(1).argmin())
    shape, position = labels[best]
    return [_nearest(COLOURS, colour), shape, position, _nearest(GROUNDS, ground)]


@functools.cache
def _templates(size: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Return masks and (shape, position) of all shapes and positions, 3 sizes and 9 jitters."""
    masks, labels = [], []
    for shape in SHAPES:
        for position, (row, column) in POSITIONS.items():
            for radius in np.linspace(*RADIUS, 3):
                for dy in (-JITTER * 0.7, 0, JITTER * 0.7):
                    for dx in (-JITTER * 0.7, 0, JITTER * 0.7):
                        y, x = CENTRES[row] + dy, CENTRES[column] + dx
                        masks.append(coverage(shape, size, y, x, radius).ravel())
                        labels.append((shape, position))
    return np.stack(masks), labels
