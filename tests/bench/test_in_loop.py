"""Operators within training steps: every call found, its time its own, training unchanged."""

import json
import types

import pytest
import torch
from torch.autograd import DeviceType

from bench.__main__ import main
from bench.cases import CASES, calls_per_step
from bench.measure import in_loop, op_ranges
from bench.measure.in_loop import InLoop
from bench.measure.op_ranges import BLOCK, WATCHING, Clock, Range, labelled, record_function, spans
from bench.measure.workload import Workload
from model.config import preset
from mvsplit_ops import reference
from mvsplit_ops._register import Op

BY_NAME = {case.op: case for case in CASES}
SMALL = dict(depth=8, batch=2, device="cpu", probes=False, checkpointing="3/4")


@pytest.fixture(scope="module")
def measured():
    return in_loop.measure("collapse100", SMALL, ["eager", "cpu"], 1)


@pytest.mark.parametrize("implementation", ["eager", "cpu"])
def test_calls_of_a_step_are_the_papers(measured, implementation):
    """700/700/700/1400 and 400/400/400/800 of 400 blocks, three of four recomputed, at 8."""
    calls = {
        row.op: (row.forward_calls, row.backward_calls)
        for row in measured.rows
        if row.implementation == implementation
    }
    names = ("rope", "qk_norm") if implementation == "eager" else ("rope_qk_norm",)
    assert set(calls) == {*names, "swiglu", "mvsplit_rmsnorm"}
    for op, found in calls.items():
        assert found == calls_per_step(BY_NAME[op], 8), op
        assert tuple(n * 400 // 8 for n in found) == calls_per_step(BY_NAME[op], 400), op


def test_every_row_has_time_and_a_step_is_longer(measured):
    assert all(row.forward_ms > 0 and row.backward_ms > 0 for row in measured.rows)
    for name in ("eager", "cpu"):
        assert 0 < measured.total_ms(name) < measured.ranges_ms[name]
        assert measured.step_ms[name] > 0


def test_a_record_survives_its_file(measured):
    assert InLoop.from_json(json.loads(json.dumps(measured.to_json()))) == measured
    assert measured.to_json()["kind"] == "in_loop" and measured.run["blocks"] == 8


def test_other_residuals_and_carried_means_are_counted_too():
    for fields, op in (
        ({"residual": "layerscale"}, "residual_rmsnorm"),
        ({"carry_mean": True}, "mvsplit_rmsnorm"),
    ):
        result = in_loop.measure("collapse100", {**SMALL, **fields, "depth": 4}, ["cpu"], 1)
        (row,) = (row for row in result.rows if row.op == op)
        assert (row.forward_calls, row.backward_calls) == (14, 8)


def test_ranges_change_no_gradient():
    load = Workload(preset("collapse100", **SMALL))
    with load.running("eager"):
        load.gradients()
    plain = [p.grad.clone() for p in load.model.parameters()]
    load.optimizer.zero_grad()
    with load.running("eager"), labelled(load.model, Clock()):
        load.gradients()
    for before, after in zip(plain, load.model.parameters(), strict=True):
        assert torch.equal(before, after.grad)


def test_nothing_stays_watched():
    load = Workload(preset("collapse100", **SMALL))
    before = Op.__call__, reference.rope, reference.qk_norm, load.model.blocks[0].forward
    with pytest.raises(KeyError), labelled(load.model, Clock()):
        assert Op.__call__ is not before[0]
        raise KeyError
    assert (Op.__call__, reference.rope, reference.qk_norm) == before[:3]
    assert load.model.blocks[0].forward == before[3]


def test_every_block_has_ranges_of_its_own():
    seen = []
    load = Workload(preset("collapse100", **{**SMALL, "depth": 2, "checkpointing": "none"}))

    def span(of):
        seen.append(of)
        return record_function(of)

    with load.running("cpu"), labelled(load.model, span):
        load.gradients()
    found = [of for of in seen if of.name not in (BLOCK, WATCHING)]
    for block in (0, 1):
        of = [(r.name, r.direction) for r in found if r.block == block]
        for name, times in (("rope_qk_norm", 1), ("swiglu", 1), ("mvsplit_rmsnorm", 2)):
            assert of.count((name, "fwd")) == of.count((name, "bwd")) == times


@pytest.mark.parametrize("of", [Range("swiglu", "bwd", 17), Range("rope", "fwd", None)])
def test_a_range_is_told_in_words_and_read_back(of):
    assert Range.parse(str(of)) == of and Range.parse("aten::mm") is None


def test_a_clock_gives_each_range_what_the_ranges_in_it_leave(monkeypatch):
    times = iter([0.0, 1.0, 5.0, 8.0, 20.0, 21.0])
    monkeypatch.setattr(op_ranges.time, "perf_counter", lambda: next(times))
    clock = Clock()
    with clock:
        with clock(Range("outer", "fwd", 0)), clock(Range("inner", "fwd", 0)):
            pass
        with clock(Range("outer", "fwd", 1)):
            pass
    assert clock.medians() == {("inner", "fwd"): 4.0, ("outer", "fwd"): 4.0 + 1.0}


def test_a_clock_that_breaks_off_still_counts(monkeypatch):
    times = iter([0.0, 2.0])
    monkeypatch.setattr(op_ranges.time, "perf_counter", lambda: next(times))
    clock = Clock()
    with clock, pytest.raises(KeyError), clock(Range("a", "fwd", None)):
        raise KeyError
    assert clock.medians() == {("a", "fwd"): 2.0}


def event(name, seconds, parent=None, kind=DeviceType.CPU):
    return types.SimpleNamespace(
        name=name, device_time_total=1e6 * seconds, cpu_parent=parent, device_type=kind
    )


def test_a_gpus_kernels_count_for_the_innermost_range():
    """A block that runs again within a merge's backward is not the merge's time."""
    merge = event(str(Range("mvsplit_rmsnorm", "bwd", 3)), 10.0)
    engine = event("autograd::engine", 9.0, merge)
    block = event(str(Range(BLOCK, "fwd", 3)), 8.0, engine)
    swiglu = event(str(Range("swiglu", "fwd", 3)), 3.0, block)
    product = event("aten::mm", 5.0, block)
    mirrored = event(str(Range("swiglu", "fwd", 3)), 3.0, None, DeviceType.CUDA)
    found = in_loop.self_times([merge, engine, block, swiglu, product, mirrored])
    assert found["mvsplit_rmsnorm", "bwd"] == pytest.approx(2.0)
    assert found["swiglu", "fwd"] == pytest.approx(3.0)


def test_the_command_prints_records_traces_and_marks(tmp_path, monkeypatch, capsys):
    import nvtx

    marks, annotate = [], nvtx.annotate

    def seen(message, **options):
        marks.append((message, options["domain"], options["category"]))
        return annotate(message, **options)

    monkeypatch.setattr(nvtx, "annotate", seen)
    record, trace = tmp_path / "runs.jsonl", tmp_path / "trace.json"
    args = ["profile", "--in-loop", "--blocks", "4", "--batch", "2", "--repeats", "1", "--nvtx"]
    assert main([*args, "--json", str(record), "--trace", str(trace)]) == 0
    shown = capsys.readouterr().out
    assert "1697.4" in shown and "614.0" in shown and "not this machine" in shown
    assert json.loads(record.read_text())["kind"] == "in_loop"
    names = {e.get("name") for e in json.loads(trace.read_text())["traceEvents"]}
    assert {str(Range("swiglu", "bwd", b)) for b in range(4)} <= names
    assert ("mvsplit_rmsnorm bwd of block 3", "mvsplit", "mvsplit_rmsnorm") in marks


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trace", "t.json"], "--trace is of steps: add --in-loop"),
        (["--nvtx"], "--nvtx is of steps: add --in-loop"),
        (["--in-loop", "--dtype", "bf16"], "change it with --set"),
        (["--in-loop", "--trace", "no/such/t.json"], "--trace: no folder"),
        (["--in-loop", "--backend", "triton"], "nothing to time"),
        (["--in-loop", "--set", "dept=2"], "did you mean depth"),
    ],
    ids=lambda a: a if isinstance(a, str) else " ".join(a),
)
def test_what_does_not_fit_is_one_line(args, message, capsys):
    assert main(["profile", *args]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_without_the_nvtx_package_the_remedy_is_told(monkeypatch, capsys):
    monkeypatch.setattr(op_ranges.importlib.util, "find_spec", lambda name: None)
    assert main(["profile", "--in-loop", "--nvtx"]) == 2
    assert "pip install nvtx" in capsys.readouterr().err


def test_spans_are_nested_in_order():
    order = []

    class Span:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            order.append(f"+{self.name}")

        def __exit__(self, *unused):
            order.append(f"-{self.name}")

    with spans(lambda of: Span("a"), lambda of: Span("b"))(Range("x", "fwd", None)):
        pass
    assert order == ["+a", "+b", "-b", "-a"]
