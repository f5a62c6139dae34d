"""Response to the guard: runs of thirty blocks that collapse in nine steps, and healthy runs."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file

from model.__main__ import main
from model.config import CONTENDERS, UsageError, preset
from model.stability.guard import LOCKED, TRIP, Guard
from model.stability.response import MOST_SKIPS, Collapsed, Supervisor
from model.stability.trace import read_rows
from model.train import checkpoint, loop
from model.train.loop import Diverged, train

LOCKING = dict(depth=30, lr=0.1, batch=4, steps=20, device="cpu")
POST = CONTENDERS["post"]


def collapsing(**changes):
    return preset("collapse100", **{**POST, **LOCKING, **changes})


def same_weights(run, other):
    """Check that the newest checkpoints of two runs have equal weights."""
    weights, others = (
        load_file(checkpoint.find(path) / "model-00000.safetensors") for path in (run, other)
    )
    return all(torch.equal(t, others[name]) for name, t in weights.items())


def saved_steps(run):
    return sorted(int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return a run that the guard stopped, and the exception."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Collapsed) as end:
        train(collapsing(save_every=2), run, guard="stop")
    return run, end.value


def test_a_locked_run_is_stopped_with_its_evidence(stopped):
    run, error = stopped
    last = read_rows(run / "metrics.jsonl")[-1]
    assert last["guard"] == LOCKED and last["step"] < 20 and len(last["signals"]) == 3
    assert error.folder == run / f"collapse-{last['step']}"
    assert {p.name for p in error.folder.iterdir()} == {"trace.json", "trace.png", "verdict.json"}
    verdict = json.loads((error.folder / "verdict.json").read_text())
    assert verdict["verdict"] == LOCKED and verdict["first"][LOCKED]["step"] == last["step"]
    assert verdict["lead"] == last["step"] - verdict["first"][TRIP]["step"] > 0
    good = run / verdict["last_good_checkpoint"]
    assert checkpoint.read_meta(good).step < verdict["first"][TRIP]["step"]
    assert f"with a lower lr, --resume {good} --out NEW --set lr=" in str(error)
    assert f"step {last['step']}: LOCKED (TCS" in str(error)
    assert (run / f"trip-{verdict['first'][TRIP]['step']}" / "trace.json").is_file()


def test_no_checkpoint_is_saved_while_a_trip_is_near(stopped):
    run, _ = stopped
    verdict = json.loads(next(run.glob("collapse-*/verdict.json")).read_text())
    assert max(saved_steps(run)) < verdict["first"][TRIP]["step"]


def test_a_stopped_run_resumes_and_stops_in_the_same_way(stopped):
    run, error = stopped
    before, folder = read_rows(run / "metrics.jsonl"), error.folder
    evidence = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(Collapsed) as again:
        train(collapsing(save_every=2), run, guard="stop")
    assert again.value.folder.name == f"{folder.name}-2"  # nothing is overwritten
    assert evidence == {p: p.read_bytes() for p in folder.iterdir()}
    after = read_rows(run / "metrics.jsonl")
    timed = ("seconds_per_step", "data_seconds_per_step")
    for row, other in zip(before, after, strict=True):
        assert {k: v for k, v in row.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }


def test_the_remedy_in_the_message_works(stopped, tmp_path):
    """Resume in another folder with a lower lr. Most other fields must not change."""
    run, error = stopped
    good = next((run / "checkpoints").glob("step-*"))
    config = collapsing(lr=1e-3, clip=0.5, steps=12)
    last = train(config, tmp_path / "new", resume=str(good), guard="stop")
    assert last["step"] == 12 and last["guard"] == "quiet"
    config = collapsing(lr=1e-3, residual="mvsplit")
    with pytest.raises(UsageError, match="residual=post, not mvsplit .* which may change adam_eps"):
        train(config, tmp_path / "other", resume=str(good))


def test_the_last_good_checkpoint_is_not_pruned(tmp_path):
    """Mode warn trains past the collapse and saves the end, but the good checkpoint remains."""
    run = tmp_path / "run"
    train(collapsing(save_every=2, keep=1, steps=16), run, guard="warn")
    with pytest.raises(Collapsed) as end:
        train(collapsing(save_every=2, keep=1, steps=30), run, guard="stop")
    verdict = json.loads((end.value.folder / "verdict.json").read_text())
    good = run / verdict["last_good_checkpoint"]
    assert checkpoint.read_meta(good).step < verdict["first"][TRIP]["step"]
    assert checkpoint.newest_step(run) == 16
    trace = json.loads((end.value.folder / "trace.json").read_text())
    assert len(trace["scalars"]["loss"]["s"]) > 9


def test_mode_warn_saves_every_checkpoint(tmp_path):
    train(collapsing(save_every=2, keep=9, steps=16), tmp_path, guard="warn")
    assert saved_steps(tmp_path) == list(range(2, 17, 2))


def test_a_guard_added_later_observes_the_metrics_written_before(tmp_path):
    train(collapsing(steps=14), tmp_path / "run", guard="off")
    with pytest.raises(Collapsed, match=r"step 15: LOCKED .* no good checkpoint exists"):
        train(collapsing(steps=20), tmp_path / "run", guard="stop")


def test_an_interrupted_branch_resumes_from_its_first_step(stopped, tmp_path):
    run, error = stopped
    good = next((run / "checkpoints").glob("step-*"))
    with pytest.raises(Collapsed) as end:
        train(collapsing(), tmp_path / "new", resume=str(good), guard="stop")
    assert "resume from the last good checkpoint" in str(end.value)
    first = read_rows(tmp_path / "new" / "metrics.jsonl")[0]["step"]
    assert first == checkpoint.read_meta(good).step + 1
    train(collapsing(), tmp_path / "new", guard="warn")
    assert read_rows(tmp_path / "new" / "metrics.jsonl")[0]["step"] == first
    verdicts = sorted((tmp_path / "new").glob("collapse-*/verdict.json"))
    assert len(verdicts) == 2
    for path in verdicts:
        assert json.loads(path.read_text())["first"][TRIP]["step"] >= first


def test_mode_warn_does_not_change_the_training(tmp_path):
    last = train(collapsing(), tmp_path / "run", guard="warn")
    assert last["step"] == 20 and last["guard"] == LOCKED
    folders = {p.name.split("-")[0] for p in (tmp_path / "run").iterdir() if p.is_dir()}
    assert folders == {"trip", "collapse", "checkpoints"}
    assert len(list((tmp_path / "run").glob("collapse-*"))) == 1
    train(collapsing(), tmp_path / "unguarded", guard="off")
    assert same_weights(tmp_path / "run", tmp_path / "unguarded")


def test_mode_skip_skips_updates_and_finally_stops(tmp_path):
    with pytest.raises(Collapsed) as end:
        train(collapsing(steps=60), tmp_path / "run", guard="skip")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert skipped and all(r["guard"] == TRIP for r in rows if r.get("skipped"))
    gave_up = [row["step"] for row in rows[-MOST_SKIPS - 1 : -1]] == skipped[-MOST_SKIPS:]
    assert gave_up == (f"{MOST_SKIPS} consecutive skipped updates" in str(end.value))


def test_the_number_of_consecutive_skips_survives_a_resume(tmp_path):
    def observe(self, row, fresh=None):
        self.state, self.signals = (TRIP, ["artificial"]) if row["step"] > 2 else ("quiet", [])
        return self.state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "observe", observe)
        train(collapsing(depth=3, steps=8), tmp_path / "run", guard="skip")
        with pytest.raises(
            Collapsed, match=f"step {3 + MOST_SKIPS}: TRIP persists after {MOST_SKIPS} "
        ):
            train(collapsing(depth=3, steps=30), tmp_path / "run", guard="skip")


def test_a_resumed_run_with_skips_equals_an_uninterrupted_one(tmp_path):
    """The checkpoint contains the state of the guard."""
    changes = dict(depth=4, lr=1e-2, log_every=4, save_every=0)
    trips = {6, 7, 13}
    real = Guard.observe

    def observe(self, row, fresh=None):
        real(self, row, fresh)
        assert self.samples == row["step"]  # every step, also after a resume
        self.state, self.signals = (TRIP, ["artificial"]) if row["step"] in trips else ("quiet", [])
        return self.state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "observe", observe)
        train(collapsing(steps=16, **changes), tmp_path / "whole", guard="skip")
        train(collapsing(steps=9, **changes), tmp_path / "parts", guard="skip")
        train(collapsing(steps=16, **changes), tmp_path / "parts", guard="skip")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    whole = [(r["step"], r.get("skipped")) for r in read_rows(tmp_path / "whole/metrics.jsonl")]
    assert [step for step, skipped in whole if skipped] == [6, 7, 13]
    assert checkpoint.read_meta(checkpoint.find(tmp_path / "whole")).updates == 13


def test_non_finite_steps_are_skipped_a_limited_number_of_times(tmp_path, monkeypatch):
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
    with pytest.raises(Diverged, match=f"step {2 + MOST_SKIPS}: loss"):
        train(collapsing(depth=3, steps=40), tmp_path / "never", guard="skip")
    steps = iter(range(1, 100))
    with pytest.raises(Diverged, match="step 2: loss"):
        train(collapsing(depth=3, steps=40), tmp_path / "stop", guard="stop")


def test_a_healthy_run_is_not_affected(tmp_path):
    config = preset("collapse100", **CONTENDERS["mvsplit"], depth=8, steps=30, lr=3e-3)
    assert train(config, tmp_path / "run", guard="stop")["guard"] == "quiet"
    assert not list((tmp_path / "run").glob("trip-*"))


def test_a_guard_needs_probes_and_a_valid_mode(tmp_path):
    with pytest.raises(UsageError, match="guard=stop needs the measurements of the probes; pass"):
        train(collapsing(probes=False), tmp_path / "run", guard="stop")
    with pytest.raises(UsageError, match="guard must be one of off, warn, stop, skip, got 'halt'"):
        train(collapsing(), tmp_path / "run", guard="halt")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="guard must be one of"):
        Supervisor(Guard(3), "halt", tmp_path, [])


def test_a_run_that_ends_with_a_nan_loss_prints_it(tmp_path, monkeypatch, capsys):
    finite = loop.compute_gradients

    def gradients(*args):
        loss, quarters = finite(*args)
        return loss * math.nan, quarters

    monkeypatch.setattr(loop, "compute_gradients", gradients)
    args = ["train", "collapse100", "--guard", "skip", "--out", str(tmp_path / "run"), *SET]
    for _ in range(2):
        assert main([*args, "--set", "depth=3", "steps=2"]) == 0
        assert "step 2, loss nan;" in capsys.readouterr().out


# The commands


SET = ["--set", *(f"{name}={value}" for name, value in {**POST, **LOCKING}.items())]


def test_train_exits_with_code_3_after_a_collapse(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", "collapse100", "--out", run, *SET]) == 3  # stop is the default
    out = capsys.readouterr()
    trip, *_, end = out.err.splitlines()
    assert re.match(r"step \d+: TRIP: TCS .*; rho .*; G_mean/G_ctr ", trip)
    assert end.startswith("python -m model train: step ") and "LOCKED (TCS" in end
    assert "no good checkpoint exists (--set save_every=N" in end
    off = ["--guard", "off", "--set", "steps=3"]
    assert main(["train", "collapse100", "--out", run + "2", *SET, *off]) == 0
    no_probes = ["--set", "probes=false", "steps=3"]
    assert main(["train", "collapse100", "--out", run + "3", *SET, *no_probes]) == 0


def test_diagnose_prints_and_draws(stopped, tmp_path, capsys):
    run, error = stopped
    record = tmp_path / "findings.json"
    assert main(["diagnose", str(run), "--json", str(record)]) == 0
    out = capsys.readouterr().out
    assert "Verdict: LOCKED" in out and "TRIP   first at step" in out
    assert (run / "run-mms.png").read_bytes().startswith(b"\x89PNG")
    findings = json.loads(record.read_text())
    live = json.loads((error.folder / "verdict.json").read_text())
    for name in ("verdict", "first", "lead", "missing", "blocks"):
        assert findings[name] == live[name], name  # a replay detects the same as the live guard
    assert main(["diagnose", str(run), "--json", str(record)]) == 2
    assert "exists; choose another path" in capsys.readouterr().err
    assert main(["diagnose", str(run), "--out", str(tmp_path / "picture")]) == 2
    assert "must be named *.png" in capsys.readouterr().err
    assert main(["diagnose", str(run), "--json", str(tmp_path / "none" / "x.json")]) == 2
    assert "does not exist; create it first" in capsys.readouterr().err
    picture = tmp_path / "x.png"
    assert main(["diagnose", str(error.folder), "--out", str(picture)]) == 0 and picture.is_file()
    assert main(["diagnose", str(tmp_path / "none")]) == 2
    assert "cannot read the trace" in capsys.readouterr().err


def test_diagnose_draws_traces_with_hardly_any_data(tmp_path, capsys):
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
