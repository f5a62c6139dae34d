"""What the guard does to runs: thirty blocks that collapse in nine steps, and some that train."""

import json
import math
import re

import pytest
import torch

from model.__main__ import main
from model.config import CONTENDERS, UsageError, preset
from model.stability.guard import LOCKED, TRIP, Guard
from model.stability.response import SKIPS, Collapsed, Supervisor
from model.train import checkpoint
from model.train import loop as loop
from model.train.loop import Diverged, read_rows, train

LOCKING = dict(depth=30, lr=0.1, batch=4, steps=20, device="cpu")
POST = CONTENDERS["post"]


def collapsing(**changes):
    return preset("collapse100", **{**POST, **LOCKING, **changes})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that the guard stopped, and why."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Collapsed) as end:
        train(collapsing(save_every=2), run, guard="stop")
    return run, end.value


def test_a_locked_run_is_stopped_with_its_evidence(stopped):
    run, why = stopped
    last = read_rows(run / "metrics.jsonl")[-1]
    assert last["guard"] == LOCKED and last["step"] < 20 and len(last["signals"]) == 3
    assert why.folder == run / f"collapse-{last['step']}"
    assert {p.name for p in why.folder.iterdir()} == {"trace.json", "trace.png", "verdict.json"}
    verdict = json.loads((why.folder / "verdict.json").read_text())
    assert verdict["verdict"] == LOCKED and verdict["first"][LOCKED]["step"] == last["step"]
    assert verdict["lead"] == last["step"] - verdict["first"][TRIP]["step"] > 0
    good = run / verdict["last_good_checkpoint"]
    assert checkpoint.read_meta(good)["step"] < verdict["first"][TRIP]["step"]
    assert f"with a lower lr, --resume {good} --out NEW --set lr=" in str(why)
    assert f"step {last['step']}: LOCKED (TCS" in str(why)
    assert (run / f"trip-{verdict['first'][TRIP]['step']}" / "trace.json").is_file()


def test_no_checkpoint_is_saved_while_a_trip_is_near(stopped):
    run, _ = stopped
    verdict = json.loads(next(run.glob("collapse-*/verdict.json")).read_text())
    saved = [int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("step-*")]
    assert max(saved) < verdict["first"][TRIP]["step"]


def test_a_stopped_run_goes_on_from_the_last_good_checkpoint_as_it_did(stopped):
    run, why = stopped
    before, folder = read_rows(run / "metrics.jsonl"), why.folder
    kept = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(Collapsed) as again:
        train(collapsing(save_every=2), run, guard="stop")
    assert again.value.folder.name == f"{folder.name}-2"  # nothing is overwritten
    assert kept == {p: p.read_bytes() for p in folder.iterdir()}
    after = read_rows(run / "metrics.jsonl")
    timed = ("seconds_per_step", "data_seconds_per_step")
    for row, other in zip(before, after, strict=True):
        assert {k: v for k, v in row.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }


def test_the_remedy_goes_on_from_the_last_good_checkpoint(stopped, tmp_path):
    """As the message says: another folder, a lower lr; no other choice may change."""
    run, why = stopped
    good = next((run / "checkpoints").glob("step-*"))
    config = collapsing(lr=1e-3, clip=0.5, steps=12)
    last = train(config, tmp_path / "new", resume=str(good), guard="stop")
    assert last["step"] == 12 and last["guard"] == "quiet"
    config = collapsing(lr=1e-3, residual="mvsplit")
    with pytest.raises(UsageError, match="residual=post, not mvsplit .* which may change adam_eps"):
        train(config, tmp_path / "other", resume=str(good))


def test_the_last_good_checkpoint_outlives_worse_ones(tmp_path):
    """A run that is let on past its collapse saves its end, and yet names what came before."""
    run = tmp_path / "run"
    train(collapsing(save_every=2, keep=1, steps=16), run, guard="warn")
    with pytest.raises(Collapsed) as end:
        train(collapsing(save_every=2, keep=1, steps=30), run, guard="stop")
    verdict = json.loads((end.value.folder / "verdict.json").read_text())
    good = run / verdict["last_good_checkpoint"]
    assert checkpoint.read_meta(good)["step"] < verdict["first"][TRIP]["step"]
    assert checkpoint.newest_step(run) == 16
    assert (
        len(json.loads((end.value.folder / "trace.json").read_text())["scalars"]["loss"]["s"]) > 9
    )


def test_a_warning_keeps_no_checkpoint_back(tmp_path):
    train(collapsing(save_every=2, keep=9, steps=16), tmp_path, guard="warn")
    saved = sorted(int(p.name.split("-")[1]) for p in (tmp_path / "checkpoints").glob("step-*"))
    assert saved == list(range(2, 17, 2))


def test_a_guard_that_comes_later_knows_what_the_run_has_written(tmp_path):
    train(collapsing(steps=14), tmp_path / "run", guard="off")
    with pytest.raises(Collapsed, match=r"step 15: LOCKED .* no checkpoint was saved before"):
        train(collapsing(steps=20), tmp_path / "run", guard="stop")


def test_a_branch_that_is_broken_off_goes_on_from_where_it_began(stopped, tmp_path):
    run, why = stopped
    good = next((run / "checkpoints").glob("step-*"))
    with pytest.raises(Collapsed) as end:
        train(collapsing(), tmp_path / "new", resume=str(good), guard="stop")
    assert "go on from the last good checkpoint" in str(end.value)
    first = read_rows(tmp_path / "new" / "metrics.jsonl")[0]["step"]
    assert first == checkpoint.read_meta(good)["step"] + 1
    train(collapsing(), tmp_path / "new", guard="warn")
    assert read_rows(tmp_path / "new" / "metrics.jsonl")[0]["step"] == first
    verdicts = sorted((tmp_path / "new").glob("collapse-*/verdict.json"))
    assert len(verdicts) == 2
    for path in verdicts:
        assert json.loads(path.read_text())["first"][TRIP]["step"] >= first


def test_a_warning_stops_nothing(tmp_path):
    last = train(collapsing(), tmp_path / "run", guard="warn")
    assert last["step"] == 20 and last["guard"] == LOCKED
    folders = {p.name.split("-")[0] for p in (tmp_path / "run").iterdir() if p.is_dir()}
    assert folders == {"trip", "collapse", "checkpoints"}
    assert len(list((tmp_path / "run").glob("collapse-*"))) == 1
    train(collapsing(), tmp_path / "alone", guard="off")
    one, other = (
        checkpoint._read(checkpoint.find(tmp_path / n), "model") for n in ("run", "alone")
    )
    assert all(torch.equal(t, other[name]) for name, t in one.items())


def test_skipping_leaves_the_update_out_and_gives_up_in_the_end(tmp_path):
    with pytest.raises(Collapsed) as end:
        train(collapsing(steps=60), tmp_path / "run", guard="skip")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert skipped and all(r["guard"] == TRIP for r in rows if r.get("skipped"))
    gave_up = [row["step"] for row in rows[-SKIPS - 1 : -1]] == skipped[-SKIPS:]
    assert gave_up == (f"{SKIPS} updates skipped in a row" in str(end.value))


def test_how_often_it_skipped_in_a_row_is_not_forgotten(tmp_path):
    def observe(self, row, fresh=None):
        self.state, self.signals = (TRIP, ["made"]) if row["step"] > 2 else ("quiet", [])
        return self.state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "observe", observe)
        train(collapsing(depth=3, steps=8), tmp_path / "run", guard="skip")
        with pytest.raises(Collapsed, match=f"step {3 + SKIPS}: TRIP, and {SKIPS} updates"):
            train(collapsing(depth=3, steps=30), tmp_path / "run", guard="skip")


def test_a_run_that_skips_and_resumes_is_the_run_that_does_not_break(tmp_path):
    """What the guard remembers is in the checkpoint."""
    changes = dict(depth=4, lr=1e-2, log_every=4, save_every=0)
    trips = {6, 7, 13}
    real = Guard.observe

    def observe(self, row, fresh=None):
        real(self, row, fresh)
        assert self.samples == row["step"]  # all of them, whether it was resumed or not
        self.state, self.signals = (TRIP, ["made"]) if row["step"] in trips else ("quiet", [])
        return self.state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "observe", observe)
        train(collapsing(steps=16, **changes), tmp_path / "whole", guard="skip")
        train(collapsing(steps=9, **changes), tmp_path / "parts", guard="skip")
        train(collapsing(steps=16, **changes), tmp_path / "parts", guard="skip")
    one, other = (
        checkpoint._read(checkpoint.find(tmp_path / n), "model") for n in ("whole", "parts")
    )
    assert all(torch.equal(t, other[name]) for name, t in one.items())
    whole = [(r["step"], r.get("skipped")) for r in read_rows(tmp_path / "whole/metrics.jsonl")]
    assert [step for step, skipped in whole if skipped] == [6, 7, 13]
    assert checkpoint.read_meta(checkpoint.find(tmp_path / "whole"))["updates"] == 13


def test_what_is_not_finite_is_skipped_a_while(tmp_path, monkeypatch):
    finite, bad = loop.gradient_norms, set(range(3, 6))
    steps = iter(range(1, 100))

    def norms(optimizer):
        return finite(optimizer) * (math.nan if next(steps) in bad else 1)

    monkeypatch.setattr(loop, "gradient_norms", norms)
    config = collapsing(depth=3, lr=1e-3, steps=8)
    train(config, tmp_path / "skip", guard="skip")
    rows = read_rows(tmp_path / "skip" / "metrics.jsonl")
    assert [r["step"] for r in rows if r.get("skipped")] == [3, 4, 5]
    assert rows[3]["grad_norm"] is None
    bad, steps = set(range(2, 100)), iter(range(1, 100))
    with pytest.raises(Diverged, match=f"step {2 + SKIPS}: loss"):
        train(collapsing(depth=3, steps=40), tmp_path / "never", guard="skip")
    steps = iter(range(1, 100))
    with pytest.raises(Diverged, match="step 2: loss"):
        train(collapsing(depth=3, steps=40), tmp_path / "stop", guard="stop")


def test_a_run_that_trains_is_left_alone(tmp_path):
    config = preset("collapse100", **CONTENDERS["mvsplit"], depth=8, steps=30, lr=3e-3)
    assert train(config, tmp_path / "run", guard="stop")["guard"] == "quiet"
    assert not list((tmp_path / "run").glob("trip-*"))


def test_a_guard_needs_probes_and_a_mode_that_there_is(tmp_path):
    with pytest.raises(UsageError, match="guard=stop needs what probes measure; pass probes=true"):
        train(collapsing(probes=False), tmp_path / "run", guard="stop")
    with pytest.raises(UsageError, match="guard must be one of off, warn, stop, skip, got 'halt'"):
        train(collapsing(), tmp_path / "run", guard="halt")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="guard must be one of"):
        Supervisor(Guard(3), "halt", tmp_path, [])


def test_a_run_that_ends_without_a_finite_loss_says_so(tmp_path, monkeypatch, capsys):
    finite = loop.gradients

    def gradients(*args):
        loss, quarters = finite(*args)
        return loss * math.nan, quarters

    monkeypatch.setattr(loop, "gradients", gradients)
    args = ["train", "collapse100", "--guard", "skip", "--out", str(tmp_path / "run"), *SET]
    for _ in range(2):
        assert main([*args, "--set", "depth=3", "steps=2"]) == 0
        assert "step 2, loss nan;" in capsys.readouterr().out


def test_a_child_that_says_much_is_not_waited_for(tmp_path, monkeypatch):
    """Its complaints go to a file: a pipe holds 64 KB, and then it would wait for us."""
    import subprocess
    import sys

    from model.train import runs

    script = "import sys; sys.stderr.write('x' * 300_000 + chr(10) + 'the end'); sys.exit({})"
    real = subprocess.Popen

    def started(code):
        command = [sys.executable, "-c", script.format(code)]
        return lambda _, **how: real(command, **how)

    monkeypatch.setattr(runs.subprocess, "Popen", started(0))
    assert runs.train_all({"a": runs.Job("tiny")}, tmp_path, lambda lines: None) == {"a": []}
    monkeypatch.setattr(runs.subprocess, "Popen", started(1))
    with pytest.raises(UsageError, match="training a failed: the end"):
        runs.train_all({"a": runs.Job("tiny")}, tmp_path, lambda lines: None)


# The commands


SET = ["--set", *(f"{name}={value}" for name, value in {**POST, **LOCKING}.items())]


def test_the_command_ends_with_code_3(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", "collapse100", "--out", run, *SET]) == 3  # stop is the default
    out = capsys.readouterr()
    trip, *_, end = out.err.splitlines()
    assert re.match(r"step \d+: TRIP: TCS .*; rho .*; G_mean/G_ctr ", trip)
    assert end.startswith("python -m model train: step ") and "LOCKED (TCS" in end
    assert "no checkpoint was saved before (--set save_every=N)" in end
    off = ["--guard", "off", "--set", "steps=3"]
    assert main(["train", "collapse100", "--out", run + "2", *SET, *off]) == 0
    no_probes = ["--set", "probes=false", "steps=3"]
    assert main(["train", "collapse100", "--out", run + "3", *SET, *no_probes]) == 0


def test_diagnose_tells_and_draws(stopped, tmp_path, capsys):
    run, why = stopped
    record = tmp_path / "found.json"
    assert main(["diagnose", str(run), "--json", str(record)]) == 0
    out = capsys.readouterr().out
    assert "Verdict: LOCKED" in out and "TRIP   first at step" in out
    assert (run / "run-mms.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(record.read_text())
    live = json.loads((why.folder / "verdict.json").read_text())
    for name in ("verdict", "first", "lead", "missing", "blocks"):
        assert found[name] == live[name], name  # a replay sees what the run saw
    assert main(["diagnose", str(run), "--json", str(record)]) == 2
    assert "exists; choose another" in capsys.readouterr().err
    assert main(["diagnose", str(run), "--out", str(tmp_path / "picture")]) == 2
    assert "must be named .png" in capsys.readouterr().err
    assert main(["diagnose", str(run), "--json", str(tmp_path / "none" / "x.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    picture = tmp_path / "x.png"
    assert main(["diagnose", str(why.folder), "--out", str(picture)]) == 0 and picture.is_file()
    assert main(["diagnose", str(tmp_path / "none")]) == 2
    assert "cannot read the trace" in capsys.readouterr().err


def test_diagnose_draws_what_little_there_is(tmp_path, capsys):
    for name, data in {
        "loss": {"scalars": {"loss": {"s": [1], "v": [2.0]}}},
        "tcs": {"layerwise": {"tcs": {"7": {"s": [3, 9], "v": [0.5, None]}}}},
        "scalar": {"scalars": {"tcs": {"s": [1, 2], "v": [0.5, 0.6]}}, "config": {"depth": 9}},
        "zeros": {"scalars": {"writer_G_ctr": {"s": [1, 2], "v": [0.0, 0.0]}}},
    }.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        assert main(["diagnose", str(path)]) == 0
        assert "Verdict: quiet" in capsys.readouterr().out
        assert (tmp_path / f"{name}-mms.png").is_file()


@pytest.mark.parametrize("name", ["amplification", "controls", "guard"])
def test_a_study_trains_tabulates_and_goes_on(name, tmp_path, monkeypatch, capsys):
    from model import config
    from model.studies import base

    small = dict(config.PRESETS["collapse100"], depth=3, warmup=1)
    monkeypatch.setitem(config.PRESETS, "collapse100", small)

    def trained(jobs, out, show):  # in this process, which knows the small preset
        for run, job in jobs.items():
            train(config.preset(job.preset, **job.changes), out / run, guard="warn")

    monkeypatch.setattr(base, "train_all", trained)
    args = ["study", name, "--steps", "3", "--blocks", "100", "--out", str(tmp_path / "s")]
    assert main([*args, "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "s" / f"{name}.json").read_text())
    assert results["study"] == name and all(row["run"] for row in results["rows"])
    if name == "amplification":
        assert "(the paper: above 0.9)" in out and (tmp_path / "s" / "amplification.png").is_file()
    if name == "guard":
        assert "0 collapsed: LOCKED on 0" in out and len(results["rows"]) == 3
    if name == "controls":
        assert len(results["rows"]) == 14 and "collapsed: none" in out
    assert main([*args, "--seeds", "1"]) == 0


def test_what_taps_cost_is_measured_in_turn(tmp_path, capsys):
    args = ["--blocks", "100", "--steps", "5", "--out", str(tmp_path)]
    assert main(["study", "overhead", *args]) == 0
    assert "of a step's CPU time, by medians" in capsys.readouterr().out
    rows = json.loads((tmp_path / "overhead.json").read_text())["rows"]
    assert [row["residual"] for row in rows] == list(CONTENDERS)
    for row in rows:
        assert {f"{clock}_ratio" for clock in ("cpu", "wall")} <= row.keys() and row["steps"] == 5


def test_a_fit_is_the_line_of_least_squares():
    import numpy as np

    from model.studies.amplification import fit

    x = np.linspace(1, 9, 40)
    y = 0.7 * x + 0.2 * np.random.default_rng(0).standard_normal(40)
    got = fit(list(zip(x.tolist(), y.tolist(), strict=True)))
    slope = (x @ y) / (x @ x)
    assert got["slope"] == pytest.approx(slope) and got["points"] == 40
    assert got["r2"] == pytest.approx(
        1 - ((y - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    )
    assert got["r2_affine"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    with pytest.raises(UsageError, match="no points to fit"):
        fit([])
