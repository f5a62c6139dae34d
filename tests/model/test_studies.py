"""Studies, and the training processes that they start."""

import json
import subprocess
import sys

import numpy as np
import pytest

from model import config
from model.__main__ import main
from model.config import CONTENDERS, UsageError
from model.studies import base
from model.studies.amplification import fit_line
from model.train import runs
from model.train.loop import train


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    small = dict(config.PRESETS["collapse100"], depth=3, warmup=1)
    monkeypatch.setitem(config.PRESETS, "collapse100", small)


@pytest.mark.parametrize("name", ["amplification", "controls", "guard"])
def test_a_study_trains_prints_a_table_and_resumes(name, tmp_path, monkeypatch, capsys):
    def train_here(jobs, out, show):  # only this process has the small preset
        for run, job in jobs.items():
            train(config.preset(job.preset, **job.changes), out / run, guard="warn")

    monkeypatch.setattr(base, "train_all", train_here)
    args = ["study", name, "--steps", "3", "--blocks", "100", "--out", str(tmp_path / "s")]
    assert main([*args, "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "s" / f"{name}.json").read_text())
    assert results["study"] == name and all(row["run"] for row in results["rows"])
    if name == "amplification":
        assert "(the paper: above 0.9)" in out and (tmp_path / "s" / "amplification.png").is_file()
    if name == "guard":
        assert "0 collapsed: LOCKED in 0" in out and len(results["rows"]) == 3
    if name == "controls":
        assert len(results["rows"]) == 14 and "collapsed: none" in out
    assert main([*args, "--seeds", "1"]) == 0


def test_overhead_of_taps_is_measured(tmp_path, capsys):
    args = ["--blocks", "100", "--steps", "5", "--out", str(tmp_path)]
    assert main(["study", "overhead", *args]) == 0
    assert "to the median CPU time of a step" in capsys.readouterr().out
    rows = json.loads((tmp_path / "overhead.json").read_text())["rows"]
    assert [row["residual"] for row in rows] == list(CONTENDERS)
    for row in rows:
        assert {f"{clock}_ratio" for clock in ("cpu", "wall")} <= row.keys() and row["steps"] == 5


def test_fit_line_is_the_least_squares_line():
    x = np.linspace(1, 9, 40)
    y = 0.7 * x + 0.2 * np.random.default_rng(0).standard_normal(40)
    fit = fit_line(list(zip(x.tolist(), y.tolist(), strict=True)))
    slope = (x @ y) / (x @ x)
    assert fit.slope == pytest.approx(slope) and fit.points == 40
    assert fit.r2 == pytest.approx(1 - ((y - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    assert fit.r2_affine == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    with pytest.raises(UsageError, match="no points to fit"):
        fit_line([])


def test_a_training_process_with_a_long_stderr_does_not_block(tmp_path, monkeypatch):
    """stderr goes to a file. A pipe holds 64 KB, then the process would wait for a reader."""
    script = "import sys; sys.stderr.write('x' * 300_000 + chr(10) + 'the end'); sys.exit({})"
    real = subprocess.Popen

    def popen(code):
        command = [sys.executable, "-c", script.format(code)]
        return lambda _, **options: real(command, **options)

    monkeypatch.setattr(runs.subprocess, "Popen", popen(0))
    assert runs.train_all({"a": runs.Job("tiny")}, tmp_path, lambda lines: None) == {"a": []}
    monkeypatch.setattr(runs.subprocess, "Popen", popen(1))
    with pytest.raises(UsageError, match="training a failed: the end"):
        runs.train_all({"a": runs.Job("tiny")}, tmp_path, lambda lines: None)
