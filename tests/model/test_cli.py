"""The commands of python -m model: output, files, errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from model.__main__ import main
from model.config import FIELDS, preset
from model.data import open_dataset
from model.evaluate.sample import Sampling, sample_images
from model.nn.dit import build
from model.train.checkpoint import open_run

ROOT = Path(__file__).parent.parent.parent
SMALL = ["depth=3", "dim=32", "heads=2", "ffn=48", "text_dim=32", "batch=4", "steps=6"]


def run_model(*args, cwd=ROOT):
    """Run the command in a process; return its exit code, stdout and stderr."""
    command = [sys.executable, "-m", "model", *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    return result.returncode, result.stdout, result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    code, out, err = run_model("train", "tiny", "--out", folder, "--set", *SMALL, "log_every=2")
    assert code == 0, err
    assert re.findall(r"^step (\d)/6 loss ", out, re.M) == ["2", "4", "6"]
    return folder


def test_help_lists_commands_and_fields(capsys):
    for args in (["--help"], *([c, "--help"] for c in
                 "train info demo diagnose study sample eval export import".split())):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(args)
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert "usage: python -m model" in text
        if args[0] in ("train", "info", "demo", "import"):
            assert all(re.search(rf"^  {name}\b", text, re.M) for name in FIELDS)


def test_a_finished_run_has_nothing_left_to_do(run, tmp_path, capsys):
    args = ["--resume", str(run), "--set", *SMALL, "log_every=2"]
    assert main(["train", "tiny", "--out", str(tmp_path / "new"), *args]) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert main(["train", "--config", str(run / "config.json")]) == 2
    assert "also pass the folder of the run" in capsys.readouterr().err


def test_a_finished_run_prints_nothing_with_quiet(run, capsys):
    assert (
        main(["train", "tiny", "--out", str(run), "--quiet", "--set", *SMALL, "log_every=2"]) == 0
    )
    assert capsys.readouterr().out == ""
    config = json.loads((run / "config.json").read_text())
    assert config["depth"] == 3 and config["seed"] == 0


def test_info_compares_the_configuration_with_the_paper(capsys):
    assert main(["info", "dit400-mvsplit"]) == 0
    out = capsys.readouterr().out
    assert "5,454,496,896 parameters" in out
    assert "rope_qk_norm 700 + 400, swiglu 700 + 400, mvsplit_rmsnorm 1400 + 800" in out
    for name, field in FIELDS.items():
        (line,) = re.findall(rf"^│ {name} .*", out, re.M)
        assert ("not stated in the paper" in line) == (field.metadata["paper"] is None), name
    for policy in ("none", "3/4", "full", "selective"):
        assert re.search(rf"│ {policy} +│ +\d\.\d+e\+", out)


def test_info_measures_the_predicted_memory():
    """Two real steps of 100 blocks of width 64, three of four recomputed."""
    code, out, err = run_model(
        "info", "collapse100", "--measure", "--set", "dim=64", "heads=4", "ffn=192", "text_dim=64",
        "checkpointing=3/4",
    )  # fmt: skip
    assert code == 0, err
    (ratio,) = re.findall(r"predicted .*, ratio (\d\.\d+)", out)
    assert 0.85 <= float(ratio) <= 1.15


def test_sample_writes_a_grid_and_its_settings(run, capsys):
    args = ["sample", str(run), "-n", "3", "--steps", "2", "--seed", "7", "--method", "heun"]
    assert main(args) == 0 and main(args) == 0
    paths = [Path(line.split(", ")[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(set(paths)) == 2  # nothing is overwritten
    one, other = (Image.open(p) for p in paths)
    assert one.size == other.size and one.tobytes() == other.tobytes()
    record = json.loads(paths[0].with_suffix(".json").read_text())
    assert record["seeds"] == [7, 8, 9] and len(record["captions"]) == 3
    assert (record["integration_steps"], record["method"], record["guidance"]) == (2, "heun", 2.0)
    assert record["step"] == 6 and record["checkpoint"].endswith("step-00000006")
    caption = "a red circle at the top left on blue"
    assert main([*args, "--caption", caption, "--out", str(run / "one.png")]) == 0
    assert json.loads((run / "one.json").read_text())["captions"] == [caption] * 3
    for name in ("one.png", "config.png"):  # there is a config.json
        assert main([*args, "--out", str(run / name)]) == 2
        assert "exists; choose another" in capsys.readouterr().err
    assert main([*args, "--set", "time_shift=4"]) == 2
    assert "time_shift is fixed by the run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*args, "--guidance", "nan"])


def test_a_sample_does_not_depend_on_the_other_samples():
    config = preset("tiny", depth=2)
    net, dataset = build(config), open_dataset(config)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    captions = dataset.captions(8)
    three_steps = Sampling(steps=3)
    images = sample_images(net, dataset, captions, range(8), three_steps)
    others = [captions[0], *dataset.captions(30)[20:27]]
    mixed = sample_images(net, dataset, others, [0, *range(50, 57)], three_steps)
    assert torch.equal(images[0], mixed[0])
    single = sample_images(net, dataset, captions[:1], [0], three_steps)
    assert torch.allclose(images[0], single[0], atol=1e-5)
    split = sample_images(net, dataset, captions, range(8), Sampling(steps=3, batch=3))
    assert torch.allclose(images, split, atol=1e-5)


def test_eval_prints_shares_and_those_by_chance(run, tmp_path, capsys):
    path = tmp_path / "eval.json"
    assert main(["eval", str(run), "-n", "8", "--steps", "2", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"colour +│ +\d+\.\d% │ +16\.7%", out)
    shares = json.loads(path.read_text())["shares"]
    assert list(shares) == ["colour", "shape", "position", "ground", "all"]
    assert main(["eval", str(run), "-n", "8", "--steps", "2", "--json", str(path)]) == 2


@pytest.mark.parametrize("to", ["official", "safetensors"])
def test_exported_weights_are_imported_bit_for_bit(run, tmp_path, to, capsys):
    file = tmp_path / ("model.pt" if to == "official" else "model.safetensors")
    assert main(["export", str(run), "--to", to, "--out", str(file)]) == 0
    assert main(["export", str(run), "--to", to, "--out", str(file)]) == 2
    assert "exists; choose another --out" in capsys.readouterr().err
    size = ["tiny", "--set", *SMALL] if to == "official" else []
    assert main(["import", str(file), *size, "--out", str(tmp_path / "back")]) == 0
    one, other = (open_run(path)[0].state_dict() for path in (run, tmp_path / "back"))
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[name]) for name, t in one.items())
    assert main(["sample", str(tmp_path / "back"), "-n", "1", "--steps", "1"]) == 0
    assert main(["import", str(file), *size, "--out", str(tmp_path / "back")]) == 2
    assert "already contains a run" in capsys.readouterr().err


def test_export_errors_name_the_remedy(tmp_path, capsys):
    small = [*SMALL, "residual=layerscale", "steps=1"]
    assert main(["train", "--out", str(tmp_path / "r"), "--quiet", "--set", *small]) == 0
    export = ["export", str(tmp_path / "r"), "--to"]
    for to, file, message in (
        ("official", "m.pt", "use --to safetensors"),
        ("safetensors", "m.pt", "suffix .safetensors is required"),
        ("safetensors", "none/m.safetensors", "create it first"),
    ):
        assert main([*export, to, "--out", str(tmp_path / file)]) == 2
        assert message in capsys.readouterr().err
    assert main([*export, "safetensors", "--out", str(tmp_path / "m.safetensors")]) == 0
    file = str(tmp_path / "m.safetensors")
    imported = ["import", file, "--out", str(tmp_path / "b"), "--set", "steps=9"]
    assert main(imported) == 0
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["steps"], config["depth"]) == (9, 3)


def test_demo_trains_three_residuals_and_draws_them(tmp_path):
    settings = ["depth=4", "steps=3", "batch=2"]
    code, out, err = run_model("demo", "collapse100", "--out", tmp_path, "--set", *settings)
    assert code == 0, err
    for name in ("post", "layerscale", "mvsplit"):
        assert re.search(rf"│ {name} +│ +3/3 │", out)
    assert Image.open(tmp_path / "collapse100.png").size[0] > 800


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "tinny"], "unknown preset 'tinny', did you mean tiny?"),
        (["train", "--set", "dept=3"], "unknown field 'dept', did you mean depth?"),
        (["train", "--set", "residual=mv"], "unknown residual 'mv'"),
        (["train", "--set", "backend=cuda12"], "backend must be one of reference, cpu"),
        (["train", "--set", "device=cuda:7"], "device 'cuda:7' cannot be used here"),
        (["train", "--set", "data=latents"], "no latents at"),
        (["train", "--config", "none.json"], "cannot read the configuration none.json"),
        (["train", "--resume", "nowhere"], "nowhere is neither a run"),
        (["train", "tiny", "--config", "x.json"], "expected a preset or a --config, got both"),
        (["train", "--set", f"seed={1 << 64}"], "seed must be below 2^63"),
        (["demo", "--set", "residual=post"], "demo sets "),
        (["sample", "nowhere"], "nowhere is neither a run with a checkpoint nor a checkpoint"),
        (["import", "none.pt", "tiny"], "no file none.pt"),
    ],
)
def test_a_usage_error_is_one_line_with_exit_code_2(args, message, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")] if args[0] in ("train", "import") else []
    assert main([*args, *out]) == 2
    err = capsys.readouterr().err
    assert (
        message in err and err.startswith(f"python -m model {args[0]}: ") and err.count("\n") == 1
    )
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("damage", ["other width", "missing", "extra", "cut", "no weights"])
def test_import_of_weights_that_do_not_fit_is_an_error(damage, tmp_path, capsys):
    config = preset("tiny", **{k: int(v) for k, v in (s.split("=") for s in SMALL)})
    state = dict(build(config).state_dict())
    path, out = tmp_path / "model.pt", tmp_path / "run"
    if damage == "missing":
        del state["final_proj.bias"]
    if damage == "extra":
        state["blocks.9.ffn.w2.weight"] = torch.zeros(1)
    torch.save([1] if damage == "no weights" else state, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    width = ["dim=64", "heads=4"] if damage == "other width" else []
    assert main(["import", str(path), "tiny", "--out", str(out), "--set", *SMALL, *width]) == 2
    message = {
        "other width": "does not fit the model",
        "missing": "final_proj.bias is missing",
        "extra": "blocks.9.ffn.w2.weight is not part of this model",
        "cut": "not a complete file of weights",
        "no weights": "must contain a state dict that has only tensors",
    }[damage]
    assert message in capsys.readouterr().err
    assert not out.exists()
