"""Taps: a training is bit-identical with them, and they measure each sample once."""

import pytest
import torch

from model.config import preset
from model.data import open_dataset
from model.nn.dit import build
from model.stability import taps
from model.train.optim import make_optimizer
from model.train.step import compute_gradients, draw_batch, gradient_norms, update

SMALL = dict(
    depth=5, dim=32, heads=2, ffn=48, text_dim=32, size=12, batch=4, warmup=5, threads=1,
    lr=1e-2, writer_init="default", init_beta=0.1,
)  # fmt: skip


def train_steps(probes, n=4, **changes):
    """Return the parameters after n steps and the rows of the recorder."""
    config = preset("tiny", **{**SMALL, **changes})
    model, dataset = build(config), open_dataset(config)
    optimizer = make_optimizer(model, config)
    recorder = taps.Recorder(model, optimizer, probes)
    if config.compile:
        for block in model.blocks:
            block.compile()
    for step in range(n):
        recorder.begin(step + 1)
        loss, quarters = compute_gradients(config, model, draw_batch(config, dataset, step), "cpu")
        norms = gradient_norms(optimizer)
        recorder.record(step + 1, loss, norms, quarters)
        update(config, step, optimizer, norms.norm())
    return dict(model.named_parameters()), recorder.rows()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"checkpointing": "full"},
        {"checkpointing": "3/4", "carry_mean": True},
        {"checkpointing": "selective"},
        {"residual": "layerscale", "micro_batch": 3},
        {"residual": "post", "writer_init": "zero", "precision": "bf16-autocast"},
        {"precision": "bf16"},
        {"residual": "hard_center"},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()) or "plain",
)
def test_training_is_bit_identical_with_and_without_taps(changes):
    (with_taps, rows), (without, plain) = (
        train_steps(probes, n=5, **changes) for probes in (True, False)
    )
    assert all(torch.equal(p, without[name]) for name, p in with_taps.items())
    assert [r["loss"] for r in rows] == [r["loss"] for r in plain]
    assert rows[0]["layerwise"]["tcs"].keys() == {"1", "2", "3", "4"} and not plain[0]["layerwise"]


@pytest.mark.parametrize("changes", [{"checkpointing": "full"}, {"checkpointing": "3/4"}])
def test_recomputed_blocks_are_measured_once(changes):
    rows, again = train_steps(True)[1], train_steps(True, **changes)[1]
    for row, other in zip(rows, again, strict=True):
        assert same_layerwise(row, other)
        for name in ("loss", "grad_norm", "writer_G_ctr", "global_Q", "deep_W2"):
            assert row[name] == pytest.approx(other[name], rel=1e-4), name


def same_layerwise(row, other):
    """Check that the metrics of the layers are equal up to rounding."""
    assert row["layerwise"].keys() == other["layerwise"].keys()
    for metric, table in row["layerwise"].items():
        assert table == pytest.approx(other["layerwise"][metric], rel=1e-4, nan_ok=True), metric
    return True


def test_compiled_blocks_are_measured_and_train_the_same():
    torch._dynamo.reset()  # otherwise graphs that another test compiled are reused
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    (compiled, rows), (eager, same_rows) = train_steps(True, compile=True), train_steps(True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    for row, other in zip(rows, same_rows, strict=True):
        assert same_layerwise(row, other)
    without, _ = train_steps(False, compile=True)
    for name, p in compiled.items():
        assert torch.allclose(p, eager[name], atol=1e-4), name
        assert torch.equal(p, without[name]), name


def test_the_global_generator_is_not_used():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_steps(True)
    assert torch.equal(before, torch.get_rng_state())


def test_rows_are_copied_together(monkeypatch):
    model = build(preset("tiny", **SMALL))
    recorder = taps.Recorder(model, make_optimizer(model, model.config), log_every=10)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    copies = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: copies.append(1) or tolist(t))
    norms = gradient_norms(make_optimizer(model, model.config))
    for step in range(1, 11):
        recorder.record(step, torch.tensor(float(step)), norms, torch.ones(2, 4))
    assert not copies
    rows = recorder.rows()
    assert len(copies) == 1 and [r["step"] for r in rows] == list(range(1, 11))
    assert [r["loss"] for r in rows] == list(range(1, 11)) and recorder.rows() == []
    for step in range(1000):
        recorder.record(step, torch.tensor(0.0), norms, torch.ones(2, 4))
    assert [r["step"] for r in recorder.rows()] == list(range(1000 - recorder.MOST_ROWS, 1000))
    assert len(recorder.history) == recorder.MOST_ROWS


@pytest.mark.parametrize(("log_every", "every"), [(1, 5), (3, 6), (7, 7), (10, 10)])
def test_attention_maps_are_measured_in_written_lines(log_every, every):
    model = build(preset("tiny", **SMALL))
    recorder = taps.Recorder(model, make_optimizer(model, model.config), log_every=log_every)
    probe = model.blocks[4].probe
    measured = [step for step in range(1, 31) if recorder.begin(step) or probe.maps]
    assert measured == list(range(every, 31, every))


def test_sampling_between_steps_is_not_measured():
    model = build(preset("tiny", **SMALL))
    probes = taps.attach(model)
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16), torch.randn(2, 4, 32))
    assert all(not probe._sums for probe in probes.values())


def test_four_depths_are_tapped():
    assert taps.tapped_layers(400) == [100, 200, 300, 399]
    assert taps.tapped_layers(100) == [25, 50, 75, 99]
    assert taps.tapped_layers(1) == [0]
