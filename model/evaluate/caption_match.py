"""Does a sample show what its caption asked for? On `shapes`, by looking at the pixels."""

from model.config import UsageError
from model.data.shapes import ATTRIBUTES, parse
from model.evaluate.sample import sample_images


def conditioning(model, dataset, n=64, seed=0, **sampling):
    """{attribute: share of n samples that match their caption}, and "all" four.

    sampling  steps, guidance, method, batch, progress: as model.sample.sample_images
    """
    if not hasattr(dataset, "recognise"):
        raise UsageError("eval looks at pixels, so it needs a model of data=shapes")
    captions = dataset.captions(n)
    images = sample_images(model, dataset, captions, range(seed, seed + n), **sampling)
    return matches(dataset, images, captions)


def matches(dataset, images, captions):
    """Shares of images that match their captions, by attribute."""
    found = dataset.recognise(images)
    hits = [
        [saw == asked for saw, asked in zip(seen, parse(caption), strict=True)]
        for seen, caption in zip(found, captions, strict=True)
    ]
    shares = {name: sum(h[i] for h in hits) / len(hits) for i, name in enumerate(ATTRIBUTES)}
    shares["all"] = sum(map(all, hits)) / len(hits)
    return shares


def by_chance():
    """The shares of a model that guesses."""
    shares = {name: 1 / len(values) for name, values in ATTRIBUTES.items()}
    everything = 1.0
    for share in shares.values():
        everything *= share
    return {**shares, "all": everything}
