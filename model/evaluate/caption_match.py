"""Agreement of samples with their captions on data=shapes, measured in the pixels."""

import math
from collections.abc import Callable, Iterable

from torch import Tensor

from model.config import UsageError
from model.data import Dataset
from model.data.shapes import ATTRIBUTES, Shapes, parse
from model.evaluate.sample import DEFAULT_SAMPLING, Sampling, sample_images
from model.nn.dit import DiT


def evaluate_captions(
    model: DiT,
    dataset: Dataset,
    n: int = 64,
    seed: int = 0,
    sampling: Sampling = DEFAULT_SAMPLING,
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> dict[str, float]:
    """Return the result of match_shares for n samples, seeds `seed`, `seed` + 1, ...

    progress  called with the number of integration steps taken and their total
    """
    if not isinstance(dataset, Shapes):
        raise UsageError("eval reads attributes from pixels and needs a model of data=shapes")
    captions = dataset.captions(n)
    images = sample_images(model, dataset, captions, range(seed, seed + n), sampling, progress)
    return match_shares(dataset, images, captions)


def match_shares(dataset: Shapes, images: Tensor, captions: Iterable[str]) -> dict[str, float]:
    """Return {attribute: share of images that match their caption}, and "all" for all four."""
    hits = [
        [word == expected for word, expected in zip(words, parse(caption), strict=True)]
        for words, caption in zip(dataset.recognise(images), captions, strict=True)
    ]
    shares = {name: sum(h[i] for h in hits) / len(hits) for i, name in enumerate(ATTRIBUTES)}
    shares["all"] = sum(map(all, hits)) / len(hits)
    return shares


def chance_shares() -> dict[str, float]:
    """Return the expected shares of a model that ignores its captions."""
    shares = {name: 1 / len(list(values)) for name, values in ATTRIBUTES.items()}
    return {**shares, "all": math.prod(shares.values())}
