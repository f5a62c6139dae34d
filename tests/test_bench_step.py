import json

import pytest

import simt
from bench import step
from bench.__main__ import main

SMALL = {"depth": 2, "batch": 2}


def test_steps_of_every_residual_and_backend_are_timed_in_turn():
    said = []
    result = step.measure(
        "collapse100", SMALL, ["layerscale", "mvsplit"], ["cpu", "reference"], 2,
        lambda what, of: said.append((what, of)),
    )  # fmt: skip
    pairs = [(row.residual, row.backend) for row in result.rows]
    assert pairs == [(r, b) for r in ("layerscale", "mvsplit") for b in ("cpu", "reference")]
    assert all(row.gradients > 0 and row.update > 0 for row in result.rows)
    assert said[-1] == ("timing", 5) and len(said) == 5
    assert result.run["config"]["depth"] == 2 and result.run["repeats"] == 2
    assert step.Steps.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_ratios_are_to_the_first_of_each():
    rows = [step.Row("a", "x", 1.0, 1.0), step.Row("a", "y", 2.0, 1.0), step.Row("b", "x", 4.0, 0)]
    run = {"device": "d", "threads": 1, "preset": "p", "repeats": 1, "torch": "t"}
    run["config"] = {"depth": 1, "dim": 1, "batch": 1, "precision": "", "checkpointing": ""}
    cells = [list(c.cells) for c in step.table(step.Steps(run, rows)).columns]
    assert cells[5] == ["1.000x", "1.500x", "1.000x"] and cells[6] == ["1.000x", "1.000x", "2.000x"]


def test_the_command_prints_and_records(tmp_path, capsys):
    path = tmp_path / "steps.jsonl"
    args = ["step", "tiny", "--repeats", "1", "--set", "depth=2", "batch=2", "--json", str(path)]
    assert main(args) == 0
    assert "One optimizer step" in capsys.readouterr().out
    assert json.loads(path.read_text())["kind"] == "step"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "dept=2"], "no field 'dept'; did you mean depth"),
        (["--json", "nowhere/x.jsonl"], "no folder"),
        (["--backend", "cuda", "--set", "depth=1"], "backend 'cuda' cannot run here"),
    ],
)
def test_bad_input_is_one_error(args, message, capsys):
    with simt.absent():
        assert main(["step", "tiny", *args]) == 2
    assert message in capsys.readouterr().err
