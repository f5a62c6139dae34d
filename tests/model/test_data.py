"""Datasets: what they return, and the errors for data that is invalid or does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import UsageError, preset
from model.data import latents, open_dataset, shapes
from model.evaluate.caption_match import chance_shares, match_shares
from model.train.loop import train


@pytest.fixture(scope="module")
def drawn():
    dataset = open_dataset(preset("tiny"))
    images = torch.stack([dataset.get(i)[0] for i in range(400)])
    return dataset, images, [dataset.caption(i) for i in range(400)]


def test_shapes_depend_on_index_and_seed(drawn):
    dataset, images, _ = drawn
    again, other = open_dataset(preset("tiny")), open_dataset(preset("tiny", seed=1))
    assert torch.equal(again.get(7)[0], images[7])
    assert not torch.equal(other.get(7)[0], images[7])
    assert (
        abs(images.mean()) < 0.05 and abs(images.var() - 1) < 0.05
    )  # so that predicting 0 has loss 2


def test_every_attribute_is_drawn_and_recognised(drawn):
    dataset, images, captions = drawn
    assert match_shares(dataset, images, captions) == dict.fromkeys(chance_shares(), 1.0)
    values = [set(column) for column in zip(*map(shapes.parse, captions), strict=True)]
    assert values == [set(names) for names in shapes.ATTRIBUTES.values()]


@pytest.mark.parametrize("size", [12, 32])
def test_attributes_are_recognised_at_other_sizes_and_in_noise(size):
    dataset = open_dataset(preset("tiny", size=size))
    images = torch.stack([dataset.get(i)[0] for i in range(100)])
    captions = [dataset.caption(i) for i in range(100)]
    assert match_shares(dataset, images, captions)["all"] > 0.95
    noisy = images + 0.2 * torch.randn(images.shape)
    assert match_shares(dataset, noisy, captions)["all"] > 0.8


def test_wrong_captions_match_by_chance(drawn):
    dataset, images, captions = drawn
    shares, chance = match_shares(dataset, images, captions[1:] + captions[:1]), chance_shares()
    for name in shapes.ATTRIBUTES:
        assert abs(shares[name] - chance[name]) < 0.09, name
    assert match_shares(dataset, torch.randn(50, 3, 16, 16), captions[:50])["all"] < 0.1


def test_captions_are_embedded_word_by_word(drawn):
    dataset, *_ = drawn
    caption = "a red circle at the top left on blue"
    assert shapes.describe(shapes.parse(caption)) == caption
    one, other = dataset.embed([caption, "a red square at the top left on blue"])
    assert one.shape == (4, 64)
    assert [torch.equal(a, b) for a, b in zip(one, other, strict=True)] == [True, False, True, True]
    assert torch.equal(dataset.embed([""])[0], dataset.empty)
    assert len(set(dataset.captions(90))) == 90
    for wrong in (
        "a red circle",
        "a red cirle at the top on blue",
        "a red circle at the top on red",
    ):
        with pytest.raises(UsageError, match="must be one of"):
            dataset.embed([wrong])


def test_shapes_that_do_not_fit_the_model_are_an_error():
    for change in ({"channels": 4}, {"text_tokens": 5}, {"size": 8}):
        with pytest.raises(UsageError, match="data=shapes needs"):
            open_dataset(preset("tiny", **change))


def latents_config(path, **changes):
    config = dict(
        data="latents", data_path=str(path), channels=4, size=8, text_tokens=3, text_dim=8
    )
    return preset("tiny", **{**config, **changes})


@pytest.fixture
def folder(tmp_path):
    """A dataset of ten latents in shards of six and four, with three captions, the first empty."""
    torch.manual_seed(1)
    x, text = 2 * torch.randn(10, 4, 8, 8) + 1, torch.randn(3, 3, 8).bfloat16()
    captions = torch.arange(10) % 3
    batches = [(x[:6].bfloat16(), captions[:6]), (x[6:].bfloat16(), captions[6:])]
    latents.write(tmp_path / "d", batches, ["", "one", "two"], text, 0, "test", 1.0, 2.0)
    return tmp_path / "d", x.bfloat16().float(), text.float()


def test_latents_are_read_as_written(folder):
    path, x, text = folder
    dataset = open_dataset(latents_config(path))
    assert len(dataset) == 10 and torch.equal(dataset.empty, text[0])
    for i in range(10):
        got, words = dataset.get(i)
        assert torch.equal(got, (x[i] - 1) / 2) and torch.equal(words, text[i % 3])
    assert torch.equal(dataset.embed(["two", "one"]), text[[2, 1]])
    assert dataset.captions(4) == ["", "one", "two", ""]
    rgb, kind = dataset.to_rgb(x[:2])
    assert rgb.shape == (2, 3, 8, 8) and 0 <= rgb.min() and rgb.max() <= 1 and "latents" in kind


def test_each_epoch_has_all_latents_in_a_different_order(folder):
    dataset = open_dataset(latents_config(folder[0]))
    epochs = [[dataset.index(10 * e + i) for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = open_dataset(latents_config(folder[0], seed=1))
    assert [other.index(i) for i in range(10)] != epochs[0]
    again = open_dataset(latents_config(folder[0]))
    assert [again.index(20 + i) for i in range(10)] == epochs[2]


def change(name, value):
    def edit(path):
        manifest = json.loads((path / "dataset.json").read_text())
        manifest[name] = value
        (path / "dataset.json").write_text(json.dumps(manifest))

    return edit


def rewrite(**changes):
    """Return an edit of the first shard that changes tensors, or removes those that are None."""

    def edit(path):
        file = path / "shard-00000.safetensors"
        tensors = load_file(file)
        for name, f in changes.items():
            tensors[name] = f(tensors[name]) if f else None
        save_file({name: t for name, t in tensors.items() if t is not None}, file)

    return edit


def cut(name):
    def edit(path):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: len(data) // 2])

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            change("empty_caption", 3),
            "dataset.json: captions must be rows of text, 0 to 2, got 3 to 3",
        ),
        (rewrite(caption=lambda t: t + 1), "shard-00000.* rows of text, 0 to 2, got 1 to 3"),
        (rewrite(caption=lambda t: t - 1), "captions must be rows of text, 0 to 2, got -1 to 1"),
        (rewrite(caption=None), "shard-00000.safetensors: expected a tensor caption"),
        (rewrite(latents=None), "got no latents"),
        (rewrite(latents=lambda t: t * float("nan")), "first 10 latents contain NaN or infinity"),
        (change("shards", []), "shards must be a list of"),
        (change("shards", [{"count": 6}]), "shards must be a list of"),
        (
            change("text_shards", [{"file": "text-00000.safetensors", "count": 0}]),
            "text_shards must",
        ),
        (change("channels", 5), "channels is 5, but the model is configured for 4"),
        (change("format", "other"), '"format" must be'),
        (change("mean", None), "mean is missing or of the wrong type"),
        (change("std", 20.0), "root mean square"),
        (
            change("shards", [{"file": "shard-00000.safetensors", "count": 7}]),
            r"expected latents \[7",
        ),
        (change("shards", [{"file": "shard-00009.safetensors", "count": 7}]), "no such file"),
        (cut("shard-00001.safetensors"), "shard-00001.safetensors: not a complete safetensors"),
        (cut("dataset.json"), "is not JSON"),
        (lambda path: (path / "dataset.json").unlink(), "pass --set data_path=FOLDER"),
        (lambda path: (path / "text-00000.safetensors").unlink(), "no such file"),
    ],
)
def test_an_invalid_dataset_is_an_error(folder, edit, message):
    edit(folder[0])
    with pytest.raises(UsageError, match=message):
        open_dataset(latents_config(folder[0]))


def test_unknown_captions_and_existing_folders_are_errors(folder):
    with pytest.raises(UsageError, match="no embedding of caption 'three'"):
        open_dataset(latents_config(folder[0])).embed(["three"])
    with pytest.raises(UsageError, match="already contains a dataset"):
        latents.write(folder[0], [], [], torch.zeros(1, 3, 8), 0)
    batch, other = (torch.zeros(2, 4, 8, 8), torch.tensor([0, 1])), folder[0].parent / "other"
    for batches, message in (
        ([], "at least one batch"),
        ([batch], "one caption from 0 to 0 for each"),
    ):
        with pytest.raises(UsageError, match=message):
            latents.write(other, batches, [""], torch.zeros(1, 3, 8), 0)
        assert not (other / "dataset.json").exists()


def test_a_sample_with_nan_stops_training(folder, tmp_path):
    path = folder[0]
    text = load_file(path / "text-00000.safetensors")["text"]
    text[1] = float("nan")
    save_file({"text": text}, path / "text-00000.safetensors")
    latents._open.cache_clear()
    with pytest.raises(UsageError, match="sample .* or its caption contains NaN or infinity"):
        train(latents_config(path, depth=1, steps=5), tmp_path / "run")


def test_a_checkpoint_of_other_latents_is_an_error(folder, tmp_path):
    train(latents_config(folder[0], depth=1, steps=2), tmp_path / "run")
    change("source", "changed")(folder[0])
    with pytest.raises(UsageError, match="was trained on latents, .* present data are latents"):
        train(latents_config(folder[0], depth=1, steps=3), tmp_path / "run")
