"""Configuration: presets, overrides, files, and errors."""

import dataclasses
import json

import pytest

from model import config as configuration
from model.config import FIELDS, PRESETS, Config, UsageError, parse_overrides, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name):
    config = preset(name)
    again = configuration.from_dict(json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and again.hash == config.hash
    assert preset(name, seed=config.seed + 1).hash != config.hash


def test_paper_presets_have_the_values_of_the_paper():
    for name, depth, beta in (("dit400-mvsplit", 400, 1.0), ("dit1000-mvsplit", 1000, 0.03)):
        c = preset(name)
        assert (c.depth, c.dim, c.heads, c.head_dim, c.ffn) == (depth, 1024, 8, 128, 3072)
        assert (c.lr, c.weight_decay, c.warmup, c.clip) == (1.5625e-4, 0.1, 1000, 1.0)
        assert (c.batch, c.time_shift, c.init_alpha, c.init_beta) == (1024, 4.0, 0.0, beta)
    assert preset("dit400-post").writer_init == "zero"
    assert preset("dit400-layerscale").residual == "layerscale"


def test_every_field_has_a_help_text_and_the_value_of_the_paper_if_stated():
    for name, field in FIELDS.items():
        assert field.metadata["help"] and "paper" in field.metadata, name
    unknown = {name for name, field in FIELDS.items() if field.metadata["paper"] is None}
    assert {"time", "beta1", "beta2", "adam_eps", "ema", "caption_drop", "precision"} <= unknown
    assert not {"depth", "dim", "lr", "weight_decay", "warmup", "clip", "time_shift"} & unknown


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("tinny"), "unknown preset 'tinny', did you mean tiny?"),
        (lambda: preset("tiny", dept=3), "unknown field 'dept', did you mean depth?"),
        (lambda: preset("tiny", residual="mvsplitt"), "unknown residual 'mvsplitt', did you mean"),
        (lambda: preset("tiny", data="x"), "unknown data 'x'. Expected one of shapes, latents"),
        (lambda: preset("tiny", depth="many"), "depth must be an integer, got 'many'"),
        (lambda: preset("tiny", depth=2.5), "depth must be an integer, got 2.5"),
        (lambda: preset("tiny", depth=True), "depth must be an integer"),
        (lambda: preset("tiny", compile="maybe"), "compile must be true or false"),
        (lambda: preset("tiny", depth=0), "depth must be at least 1, got 0"),
        (lambda: preset("tiny", lr=float("nan")), "lr must be at least 0"),
        (lambda: preset("tiny", heads=3), "multiple of 16, got 64 / 3"),
        (lambda: preset("tiny", patch=3), "multiple of patch"),
        (lambda: preset("tiny", checkpointing="4/3"), "checkpointing must be none, full"),
        (lambda: preset("tiny", checkpointing="most"), "checkpointing must be none, full"),
        (lambda: preset("tiny", caption_drop=1.0), "caption_drop must be at least 0 and below 1"),
        (lambda: preset("tiny", device="tpu"), "device must be auto, cpu"),
        (lambda: parse_overrides(["depth"]), "expected field=value, got 'depth'"),
        (lambda: parse_overrides(["dpeth=3"]), "unknown field 'dpeth', did you mean depth?"),
    ],
)  # fmt: skip
def test_an_invalid_configuration_is_a_one_line_error(call, message):
    with pytest.raises(UsageError, match=".") as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_overrides_are_parsed_in_the_type_of_their_field():
    config = preset(
        "tiny", **parse_overrides(["depth=3", "lr=1e-3", "compile=true", "data=shapes"])
    )
    assert (config.depth, config.lr, config.compile) == (3, 1e-3, True)
    assert isinstance(preset("tiny", lr=1).lr, float)


def test_an_invalid_configuration_file_is_an_error(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(preset("collapse100"))))
    assert configuration.read(path) == preset("collapse100")
    errors = ("{", "is not JSON"), ("[]", "one JSON object"), ('{"x": 1}', "unknown field 'x'")
    for text, message in errors:
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            configuration.read(path)
    with pytest.raises(UsageError, match="cannot read"):
        configuration.read(tmp_path / "none.json")


def test_three_of_four_policy_keeps_every_fourth_block():
    recomputed = configuration.recomputed_blocks
    assert recomputed("3/4", 8) == [True, True, True, False] * 2
    assert recomputed("none", 3) == [False] * 3
    assert recomputed("full", 3) == recomputed("selective", 3) == [True] * 3
    assert sum(recomputed("3/4", 400)) == 300


def test_differences_are_listed_by_field():
    one, other = Config(), Config(depth=3, seed=5)
    assert configuration.differences(one, other) == {"depth": (12, 3), "seed": (0, 5)}
    assert configuration.differences(one, other, ignored={"seed"}) == {"depth": (12, 3)}
