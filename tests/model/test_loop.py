"""The training loop: exact resume, checkpoints, metrics, guard, errors."""

import functools
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.config import UsageError
from model.data import shapes
from model.nn.dit import build
from model.train import checkpoint, loop
from model.train.checkpoint import TrainingState
from model.train.convert import export, import_weights
from model.train.loop import Diverged, train
from tests.model.small_models import SMALL, small_config

ROOT = Path(__file__).parent.parent.parent
small = functools.partial(small_config, depth=3, warmup=5, steps=20, log_every=1)


def read_state(run):
    """Return the tensors of a run's newest checkpoint, and its metrics without times."""
    folder = checkpoint.find(run)
    tensors = {
        f"{part}.{name}": t
        for part in ("model", "adamw", "average")
        if list(folder.glob(f"{part}-*"))
        for name, t in checkpoint._read_shards(folder, part).items()
    }
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds_per_step", "data_seconds_per_step")
    return tensors, [{k: v for k, v in row.items() if k not in timed} for row in rows]


def assert_same_run(one, other):
    (tensors, rows), (other_tensors, other_rows) = read_state(one), read_state(other)
    assert tensors.keys() == other_tensors.keys() and rows == other_rows
    for name, t in tensors.items():
        assert torch.equal(t, other_tensors[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of twenty uninterrupted steps."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(small(ema=0.9), run)
    return run


@pytest.mark.parametrize("policy", ["none", "3/4"])
def test_ten_steps_and_ten_resumed_steps_equal_twenty(whole, tmp_path, policy):
    train(small(ema=0.9, steps=10, checkpointing=policy), tmp_path / "run")
    assert checkpoint.newest_step(tmp_path / "run") == 10
    last = train(small(ema=0.9, checkpointing=policy), tmp_path / "run")
    assert last["step"] == 20
    assert_same_run(whole, tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    assert train(small(ema=0.9), whole)["step"] == 20
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_resuming_from_an_older_checkpoint_removes_later_metrics(whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(small(ema=0.9, save_every=5, keep=9), run)
    names = sorted(p.name for p in (run / "checkpoints").glob("step-*"))
    assert names == [f"step-{n:08d}" for n in (5, 10, 15, 20)]
    older = str(run / "checkpoints" / names[1])
    monkeypatch.chdir(tmp_path)  # "run" is the same folder by another path
    train(small(ema=0.9, save_every=5, keep=9), "run", resume=older, guard=lambda metrics: "stop")
    assert checkpoint.newest_step(run) == 10  # a kill from now on resumes from 10
    train(small(ema=0.9, save_every=5, keep=9), run)
    assert_same_run(whole, run)


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from model.config import preset
from model.train import checkpoint
from model.train.loop import train
calls = 0
def count(name):
    real = getattr(checkpoint.{module}, name)
    def run(*args, **kwargs):
        global calls
        calls += 1
        if calls == {kill_at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(checkpoint.{module}, name, run)
for name in {names!r}:
    count(name)
train(preset("tiny", **{config!r}), {run!r})
"""


@pytest.mark.parametrize(("kill_at", "saved"), [(1, None), (3, None), (4, None), (5, 8), (6, 8)])
def test_a_kill_while_saving_loses_only_the_steps_since_the_last_checkpoint(
    whole, tmp_path, kill_at, saved
):
    """Kills before the configuration (1) and a checkpoint (3, 5) are renamed, or pointed to."""
    run, config = tmp_path / "run", {**SMALL, **small.keywords, "ema": 0.9, "save_every": 8}
    source = KILLED.format(
        root=str(ROOT), kill_at=kill_at, config=config, run=str(run),
        module="os", names=("rename", "replace"),
    )  # fmt: skip
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, cwd=tmp_path)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert checkpoint.newest_step(run) == saved
    if saved:
        checkpoint.read_meta(checkpoint.find(run))
    train(small(ema=0.9), run)
    assert_same_run(whole, run)
    assert not list((run / "checkpoints").glob(".*"))


def test_old_checkpoints_are_deleted(tmp_path):
    train(small(save_every=4, keep=2), tmp_path)
    names = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-00000016", "step-00000020"]


def test_large_states_are_split_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    train(small(steps=2), tmp_path)
    folder = checkpoint.find(tmp_path)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    model, meta, _ = checkpoint.open_run(tmp_path)
    assert meta.step == 2 and model.blocks[0].ffn.w2.weight.abs().max() > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "bf16"])
def test_training_reduces_the_loss(tmp_path, precision):
    config = small(steps=60, lr=5e-3, batch=16, precision=precision)
    assert train(config, tmp_path)["loss"] < 1.5  # predicting 0 has loss 2
    dtypes = {n: p.dtype for n, p in build(config).named_parameters()}
    matrices = torch.bfloat16 if precision == "bf16" else torch.float32
    assert dtypes["blocks.0.ffn.w2.weight"] == matrices
    assert dtypes["blocks.0.fused_mvsplit_norm1.alpha"] == torch.float32


def test_compiled_blocks_train_to_the_same_loss(tmp_path):
    config = dict(steps=3, probes=False)  # test_taps.py compiles blocks with probes
    plain = train(small(**config), tmp_path / "a")["loss"]
    torch._dynamo.reset()  # graphs of other tests could be reused
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert train(small(compile=True, **config), tmp_path / "b")["loss"] == pytest.approx(plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


def test_metrics_are_strict_json_with_null_for_nan_and_infinity(whole):
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(s, parse_constant=lambda c: pytest.fail(c)) for s in lines]
    assert [row["step"] for row in rows] == list(range(1, 21))
    first = rows[0]
    assert {"loss", "grad_norm", "lr", "loss_by_t", "layerwise", "samples"} <= first.keys()
    assert {"writer_G_mean", "writer_G_ctr", "global_Q", "deep_W2"} <= first.keys()
    assert {"tcs", "rho_text", "A_ffn", "alpha_max_attention"} <= first["layerwise"].keys()
    assert list(first["layerwise"]["tcs"]) == ["0", "1", "2"]
    assert ["contraction" in row["layerwise"] for row in rows] == [n % 5 == 0 for n in range(1, 21)]
    values = {"a": [math.inf, 1.0, {"b": math.nan}]}
    assert loop._null_non_finite(values) == {"a": [None, 1.0, {"b": None}]}


def test_training_is_bit_identical_without_probes(whole, tmp_path):
    train(small(ema=0.9, probes=False), tmp_path / "run")
    (tensors, _), (without, rows) = read_state(whole), read_state(tmp_path / "run")
    assert all(torch.equal(t, without[name]) for name, t in tensors.items())
    assert rows[0]["layerwise"] == {}


def test_tensorboard_events_are_written(tmp_path):
    train(small(steps=2, tensorboard=True), tmp_path)
    assert list((tmp_path / "tensorboard").iterdir())


def test_sample_grids_are_written_and_do_not_change_training(tmp_path):
    train(small(steps=4, sample_every=2, ema=0.5), tmp_path)
    names = sorted(p.name for p in (tmp_path / "samples").iterdir())
    stems = ("step-00000002", "step-00000004")
    assert names == sorted(f"{s}{e}" for s in stems for e in (".json", ".png"))
    train(small(steps=4, ema=0.5), tmp_path / "without")
    assert_same_run(tmp_path, tmp_path / "without")


def test_a_guard_function_can_skip_an_update_or_stop_the_run(tmp_path):
    judged = []

    def guard(metrics):
        judged.append(metrics)
        return {3: "skip", 6: "stop"}.get(metrics["step"], "go")

    config = small(log_every=100, save_every=5)
    train(config, tmp_path / "run", guard=guard)
    assert [m["step"] for m in judged] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(m["layerwise"]["tcs"]["2"]) for m in judged)
    _, rows = read_state(tmp_path / "run")
    assert [row["step"] for row in rows] == [3, 6]
    assert checkpoint.newest_step(tmp_path / "run") == 5  # the stopped state at 6 is not saved
    skipped = train_weights(small(steps=3), tmp_path / "skipped", guard=guard)
    two_steps = train_weights(small(steps=2), tmp_path / "two")
    assert all(torch.equal(t, skipped[name]) for name, t in two_steps.items())
    resumed = train_weights(
        small(steps=5), tmp_path / "skipped"
    )  # AdamW has taken 2 updates, not 3
    unbroken = train_weights(small(steps=5), tmp_path / "unbroken", guard=guard)
    assert all(torch.equal(t, unbroken[name]) for name, t in resumed.items())


def train_weights(config, folder, guard=None):
    """Train a run and return the weights of its newest checkpoint."""
    train(config, folder, guard=guard)
    return checkpoint._read_shards(checkpoint.find(folder), "model")


def test_updates_with_infinity_or_nan_are_not_taken(tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(small(steps=5), run)
    before = (run / "checkpoints" / "latest").read_text()
    finite = loop.gradient_norms
    monkeypatch.setattr(loop, "gradient_norms", lambda optimizer: finite(optimizer) * math.inf)
    with pytest.raises(Diverged, match=r"step 6: loss .*, gradient norm inf; the update was not"):
        train(small(steps=9), run)
    monkeypatch.setattr(loop, "gradient_norms", finite)
    assert (run / "checkpoints" / "latest").read_text() == before
    real = shapes.draw

    def broken(seed, index, size):
        attributes, pixels = real(seed, index, size)
        return attributes, pixels * (math.nan if index == 30 else 1)

    monkeypatch.setattr(shapes, "draw", broken)
    with pytest.raises(UsageError, match="sample 30 of the data .* contains NaN .* before step 8"):
        train(small(steps=9), run)
    assert (run / "checkpoints" / "latest").read_text() == before
    monkeypatch.setattr(shapes, "draw", real)
    assert train(small(steps=9), run)["step"] == 9


def test_resuming_with_another_configuration_is_an_error(whole):
    for config, message in (
        (small(ema=0.9, dim=64, heads=4), "contains a run with dim=32, not 64"),
        (small(ema=0.9, lr=1e-3), "contains a run with lr="),
    ):
        with pytest.raises(UsageError, match=message):
            train(config, whole)
    with pytest.raises(UsageError, match="already contains a run"):
        train(small(ema=0.9), whole, resume="never")
    with pytest.raises(UsageError, match="neither a run with a checkpoint nor a checkpoint"):
        train(small(), whole.parent / "new", resume=str(whole.parent))
    with pytest.raises(UsageError, match="trained with depth=3, not 4"):
        train(small(depth=4), whole.parent / "new", resume=str(whole))
    with pytest.raises(UsageError, match="backend must be one of"):
        train(small(backend="gpu"), whole.parent / "new")
    assert not (whole.parent / "new").exists()  # an error creates no folder


def test_a_new_run_can_start_from_the_checkpoint_of_another(whole, tmp_path):
    train(small(ema=0.9, steps=22), tmp_path / "new", resume=str(whole))
    assert checkpoint.newest_step(tmp_path / "new") == 22
    assert checkpoint.newest_step(whole) == 20
    train(small(ema=0.9, steps=2), tmp_path / "other")
    before = {p: p.read_bytes() for p in (tmp_path / "other").rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match="has checkpoints of its own"):
        train(small(ema=0.9, steps=22), tmp_path / "other", resume=str(whole))
    assert {p: p.read_bytes() for p in (tmp_path / "other").rglob("*") if p.is_file()} == before


def test_the_average_of_imported_weights_starts_from_them(whole, tmp_path):
    export(whole, tmp_path / "w.safetensors", "safetensors")
    import_weights(tmp_path / "w.safetensors", tmp_path / "run", None, {"lr": 0.0})
    config = checkpoint.read_meta(checkpoint.find(tmp_path / "run")).config
    train(config, tmp_path / "run")  # with lr 0 no weight changes
    tensors, _ = read_state(tmp_path / "run")
    for name, p in build(config).named_parameters():
        assert torch.allclose(tensors[f"average.{name}"], tensors[f"model.{name}"], atol=1e-6)
        assert not p.any() or not torch.equal(p, tensors[f"model.{name}"]), name


def test_an_incomplete_line_of_metrics_is_dropped(tmp_path):
    train(small(steps=4), tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip()[:-1])  # it still ends in a brace
    assert train(small(steps=5), tmp_path)["step"] == 5
    assert [row["step"] for row in read_state(tmp_path)[1]] == [1, 2, 3, 5]


def test_a_checkpoint_of_other_data_is_an_error(whole):
    config = small(ema=0.9)
    state = TrainingState(config, "x", build(config))
    with pytest.raises(UsageError, match="trained on shapes, 16 pixels, the present data are x"):
        checkpoint.restore(checkpoint.find(whole), state)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: truncate(f / "model-00000.safetensors"), "expected .* bytes, got .* damaged"),
        (lambda f: (f / "adamw-00000.safetensors").unlink(), "no such file; the checkpoint is dam"),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json cannot be read"),
        (lambda f: (f.parent / "latest").write_text(""), "latest must name a checkpoint .*got ''"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_that_lists_the_others(tmp_path, damage, message):
    train(small(steps=4, save_every=2), tmp_path)
    damage(checkpoint.find(tmp_path))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match=message) as error:
        train(small(steps=6), tmp_path)
    assert "meta.json" in message or "resume from another: step-0000000" in str(error.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_weights_that_do_not_fit_are_an_error(tmp_path):
    state = build(small()).state_dict()
    wide = build(small(dim=64, heads=4))
    with pytest.raises(UsageError, match=r"patch_proj.weight is \(32, 3, 2, 2\), not \(64, 3"):
        checkpoint.load_strictly(wide, state, "file")
    model = build(small())
    fewer = {n: t for n, t in state.items() if n != "final_proj.bias"}
    with pytest.raises(UsageError, match=r"width 32\): final_proj.bias is missing$"):
        checkpoint.load_strictly(model, fewer, "file")
    with pytest.raises(UsageError, match="extra is not part of this model"):
        checkpoint.load_strictly(model, {**state, "extra": torch.ones(1)}, "file")
    ones = {"blocks.0.fused_mvsplit_norm1.weight": torch.zeros(32)}
    with pytest.raises(UsageError, match="must be ones"):
        checkpoint.load_strictly(model, {**state, **ones}, "file")
