"""Operators within training steps: every call is counted and timed, training is unchanged."""

import json
import types

import pytest
import torch
from torch.autograd import DeviceType

from bench.__main__ import main
from bench.cases import CASES, calls_per_step
from bench.measure import in_loop, op_ranges
from bench.measure.in_loop import InLoop
from bench.measure.op_ranges import (
    BLOCK,
    LABELLING,
    Clock,
    Range,
    Tracing,
    label_model,
    record_function,
)
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
def test_the_calls_of_a_step_are_those_of_the_paper(measured, implementation):
    """At 8 blocks a fiftieth of 700/700/700/1400 and 400/400/400/800, three of four recomputed."""
    calls = {
        row.op: (row.forward_calls, row.backward_calls)
        for row in measured.rows
        if row.implementation == implementation
    }
    names = ("rope", "qk_norm") if implementation == "eager" else ("rope_qk_norm",)
    assert set(calls) == {*names, "swiglu", "mvsplit_rmsnorm"}
    for op, counts in calls.items():
        assert counts == calls_per_step(BY_NAME[op], 8), op
        assert tuple(n * 400 // 8 for n in counts) == calls_per_step(BY_NAME[op], 400), op


def test_every_row_has_a_time_and_a_step_takes_longer(measured):
    assert all(row.forward_ms > 0 and row.backward_ms > 0 for row in measured.rows)
    for name in ("eager", "cpu"):
        assert 0 < measured.total_ms(name) < measured.ranges_ms[name]
        assert measured.step_ms[name] > 0


def test_a_record_is_equal_after_a_round_trip(measured):
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


def test_ranges_do_not_change_gradients():
    load = Workload(preset("collapse100", **SMALL))
    with load.running("eager"):
        load.gradients()
    plain = [p.grad.clone() for p in load.model.parameters()]
    load.optimizer.zero_grad()
    with load.running("eager"), label_model(load.model, Clock()):
        load.gradients()
    for before, after in zip(plain, load.model.parameters(), strict=True):
        assert torch.equal(before, after.grad)


def test_all_patches_are_removed():
    load = Workload(preset("collapse100", **SMALL))
    originals = Op.__call__, reference.rope, reference.qk_norm, load.model.blocks[0].forward
    with pytest.raises(KeyError), label_model(load.model, Clock()):
        assert Op.__call__ is not originals[0]
        raise KeyError
    assert (Op.__call__, reference.rope, reference.qk_norm) == originals[:3]
    assert load.model.blocks[0].forward == originals[3]


def test_every_block_has_its_own_ranges():
    ranges = []
    load = Workload(preset("collapse100", **{**SMALL, "depth": 2, "checkpointing": "none"}))

    def span(range_):
        ranges.append(range_)
        return record_function(range_)

    with load.running("cpu"), label_model(load.model, span):
        load.gradients()
    for block in (0, 1):
        own = [r for r in ranges if r.block == block and r.name not in (BLOCK, LABELLING)]
        for name, times in (("rope_qk_norm", 1), ("swiglu", 1), ("mvsplit_rmsnorm", 2)):
            for direction in ("fwd", "bwd"):
                assert own.count(Range(name, direction, block)) == times


@pytest.mark.parametrize("range_", [Range("swiglu", "bwd", 17), Range("rope", "fwd", None)])
def test_the_string_of_a_range_is_parsed_back(range_):
    assert Range.parse(str(range_)) == range_ and Range.parse("aten::mm") is None


def test_a_clock_subtracts_the_ranges_inside_a_range(monkeypatch):
    times = iter([0.0, 1.0, 5.0, 8.0, 20.0, 21.0])
    monkeypatch.setattr(op_ranges.time, "perf_counter", lambda: next(times))
    clock = Clock()
    with clock:
        with clock(Range("outer", "fwd", 0)), clock(Range("inner", "fwd", 0)):
            pass
        with clock(Range("outer", "fwd", 1)):
            pass
    assert clock.medians() == {("inner", "fwd"): 4.0, ("outer", "fwd"): 4.0 + 1.0}


def test_a_clock_counts_a_range_that_raises(monkeypatch):
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


def test_gpu_kernels_count_for_the_innermost_range():
    """A block that runs again within a merge's backward does not count for the merge."""
    merge = event(str(Range("mvsplit_rmsnorm", "bwd", 3)), 10.0)
    engine = event("autograd::engine", 9.0, merge)
    block = event(str(Range(BLOCK, "fwd", 3)), 8.0, engine)
    swiglu = event(str(Range("swiglu", "fwd", 3)), 3.0, block)
    product = event("aten::mm", 5.0, block)
    mirrored = event(str(Range("swiglu", "fwd", 3)), 3.0, None, DeviceType.CUDA)
    seconds = in_loop.self_times([merge, engine, block, swiglu, product, mirrored])
    assert seconds["mvsplit_rmsnorm", "bwd"] == pytest.approx(2.0)
    assert seconds["swiglu", "fwd"] == pytest.approx(3.0)


def test_the_command_writes_record_trace_and_nvtx_ranges(tmp_path, monkeypatch, capsys):
    import nvtx

    marks, annotate = [], nvtx.annotate

    def record_mark(message, **options):
        marks.append((message, options["domain"], options["category"]))
        return annotate(message, **options)

    monkeypatch.setattr(nvtx, "annotate", record_mark)
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
        (["--trace", "t.json"], "--trace applies to training steps only: add --in-loop"),
        (["--nvtx"], "--nvtx applies to training steps only: add --in-loop"),
        (["--in-loop", "--dtype", "bf16"], "change it with --set"),
        (["--in-loop", "--trace", "no/such/t.json"], "--trace: no folder"),
        (["--in-loop", "--backend", "triton"], "nothing to time"),
        (["--in-loop", "--set", "dept=2"], "did you mean depth"),
    ],
    ids=lambda a: a if isinstance(a, str) else " ".join(a),
)
def test_the_error_for_unsuitable_options_is_one_line(args, message, capsys):
    assert main(["profile", *args]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_error_without_the_nvtx_package_has_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(op_ranges.importlib.util, "find_spec", lambda name: None)
    assert main(["profile", "--in-loop", "--nvtx"]) == 2
    assert "pip install nvtx" in capsys.readouterr().err


def test_nvtx_ranges_are_nested_in_the_ranges_of_a_span(monkeypatch):
    order = []

    class Span:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            order.append(f"+{self.name}")

        def __exit__(self, *unused):
            order.append(f"-{self.name}")

    monkeypatch.setattr(op_ranges, "annotate_nvtx", lambda _: Span("b"))
    with Tracing(nvtx=True).with_nvtx(lambda _: Span("a"))(Range("x", "fwd", None)):
        pass
    assert order == ["+a", "+b", "-b", "-a"]
