import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import UsageError, preset
from model.data import latents, open_dataset, shapes
from model.evaluate.caption_match import by_chance, matches
from model.train.loop import train


@pytest.fixture(scope="module")
def drawn():
    dataset = open_dataset(preset("tiny"))
    images = torch.stack([dataset.get(i)[0] for i in range(400)])
    return dataset, images, [dataset.caption(i) for i in range(400)]


def test_shapes_are_their_index_and_seed(drawn):
    dataset, images, _ = drawn
    again, other = open_dataset(preset("tiny")), open_dataset(preset("tiny", seed=1))
    assert torch.equal(again.get(7)[0], images[7])
    assert not torch.equal(other.get(7)[0], images[7])
    assert abs(images.mean()) < 0.05 and abs(images.var() - 1) < 0.05  # loss 2 predicts nothing


def test_every_attribute_is_drawn_and_its_pixels_say_so(drawn):
    dataset, images, captions = drawn
    assert matches(dataset, images, captions) == dict.fromkeys(by_chance(), 1.0)
    seen = [set(column) for column in zip(*map(shapes.parse, captions), strict=True)]
    assert seen == [set(values) for values in shapes.ATTRIBUTES.values()]


@pytest.mark.parametrize("size", [12, 32])
def test_pixels_tell_at_other_sizes_and_through_noise(size):
    dataset = open_dataset(preset("tiny", size=size))
    images = torch.stack([dataset.get(i)[0] for i in range(100)])
    captions = [dataset.caption(i) for i in range(100)]
    assert matches(dataset, images, captions)["all"] > 0.95
    noisy = images + 0.2 * torch.randn(images.shape)
    assert matches(dataset, noisy, captions)["all"] > 0.8


def test_matching_the_wrong_captions_is_chance(drawn):
    dataset, images, captions = drawn
    shares, chance = matches(dataset, images, captions[1:] + captions[:1]), by_chance()
    for name in shapes.ATTRIBUTES:
        assert abs(shares[name] - chance[name]) < 0.09, name
    assert matches(dataset, torch.randn(50, 3, 16, 16), captions[:50])["all"] < 0.1


def test_captions_embed_word_by_word(drawn):
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


def test_shapes_refuse_a_model_that_they_do_not_fit():
    for change in ({"channels": 4}, {"text_tokens": 5}, {"size": 8}):
        with pytest.raises(UsageError, match="data=shapes needs"):
            open_dataset(preset("tiny", **change))


def small(path, **changes):
    config = dict(
        data="latents", data_path=str(path), channels=4, size=8, text_tokens=3, text_dim=8
    )
    return preset("tiny", **{**config, **changes})


@pytest.fixture
def folder(tmp_path):
    """Ten latents in shards of six and four, three captions; the first is the empty one."""
    torch.manual_seed(1)
    x, text = 2 * torch.randn(10, 4, 8, 8) + 1, torch.randn(3, 3, 8).bfloat16()
    captions = torch.arange(10) % 3
    batches = [(x[:6].bfloat16(), captions[:6]), (x[6:].bfloat16(), captions[6:])]
    latents.write(tmp_path / "d", batches, ["", "one", "two"], text, 0, "test", 1.0, 2.0)
    return tmp_path / "d", x.bfloat16().float(), text.float()


def test_latents_are_what_was_written(folder):
    path, x, text = folder
    dataset = open_dataset(small(path))
    assert len(dataset) == 10 and torch.equal(dataset.empty, text[0])
    for i in range(10):
        got, words = dataset.get(i)
        assert torch.equal(got, (x[i] - 1) / 2) and torch.equal(words, text[i % 3])
    assert torch.equal(dataset.embed(["two", "one"]), text[[2, 1]])
    assert dataset.captions(4) == ["", "one", "two", ""]
    rgb, kind = dataset.to_rgb(x[:2])
    assert rgb.shape == (2, 3, 8, 8) and 0 <= rgb.min() and rgb.max() <= 1 and "latents" in kind


def test_every_epoch_has_every_latent_in_an_order_of_its_own(folder):
    dataset = open_dataset(small(folder[0]))
    epochs = [[dataset.index(10 * e + i) for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = open_dataset(small(folder[0], seed=1))
    assert [other.index(i) for i in range(10)] != epochs[0]
    again = open_dataset(small(folder[0]))
    assert [again.index(20 + i) for i in range(10)] == epochs[2]


def change(name, value):
    def edit(path):
        manifest = json.loads((path / "dataset.json").read_text())
        manifest[name] = value
        (path / "dataset.json").write_text(json.dumps(manifest))

    return edit


def rewrite(**changes):
    """The first shard with tensors changed, or left out."""

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
        (change("empty_caption", 3), "dataset.json: a caption must be 0 to 2, .* got 3 to 3"),
        (rewrite(caption=lambda t: t + 1), "shard-00000.* a caption must be 0 to 2, .* got 1 to 3"),
        (rewrite(caption=lambda t: t - 1), "a caption must be 0 to 2, .* got -1 to 1"),
        (rewrite(caption=None), "shard-00000.safetensors: has no caption"),
        (rewrite(latents=None), "got no latents"),
        (rewrite(latents=lambda t: t * float("nan")), "first 10 latents hold .* not finite"),
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
        (change("shards", [{"file": "shard-00000.safetensors", "count": 7}]), r"says latents \[7"),
        (change("shards", [{"file": "shard-00009.safetensors", "count": 7}]), "no such file"),
        (cut("shard-00001.safetensors"), "shard-00001.safetensors: not a whole safetensors file"),
        (cut("dataset.json"), "is not JSON"),
        (lambda path: (path / "dataset.json").unlink(), "pass --set data_path=FOLDER"),
        (lambda path: (path / "text-00000.safetensors").unlink(), "no such file"),
    ],
)
def test_a_dataset_that_is_not_what_it_says_is_refused(folder, edit, message):
    edit(folder[0])
    with pytest.raises(UsageError, match=message):
        open_dataset(small(folder[0]))


def test_captions_without_embedding_and_folders_in_use_are_refused(folder):
    with pytest.raises(UsageError, match="no embedding of caption 'three'"):
        open_dataset(small(folder[0])).embed(["three"])
    with pytest.raises(UsageError, match="holds a dataset already"):
        latents.write(folder[0], [], [], torch.zeros(1, 3, 8), 0)
    batch, other = (torch.zeros(2, 4, 8, 8), torch.tensor([0, 1])), folder[0].parent / "other"
    for batches, message in (([], "at least one batch"), ([batch], "needs 2 captions of 0 to 0")):
        with pytest.raises(UsageError, match=message):
            latents.write(other, batches, [""], torch.zeros(1, 3, 8), 0)
        assert not (other / "dataset.json").exists()


def test_a_sample_that_is_not_finite_stops_training_and_is_named(folder, tmp_path):
    path = folder[0]
    text = load_file(path / "text-00000.safetensors")["text"]
    text[1] = float("nan")
    save_file({"text": text}, path / "text-00000.safetensors")
    latents._open.cache_clear()
    with pytest.raises(UsageError, match="sample .* or its caption holds a value that is not fin"):
        train(small(path, depth=1, steps=5), tmp_path / "run")


def test_latents_train_to_a_checkpoint_that_knows_them(folder, tmp_path):
    train(small(folder[0], depth=1, steps=2), tmp_path / "run")
    change("source", "changed")(folder[0])
    with pytest.raises(UsageError, match="was trained on latents, .*; the data now are latents"):
        train(small(folder[0], depth=1, steps=3), tmp_path / "run")
