"""Predicted times: costs of calls and steps, tokens that the paper implies, comparisons."""

import argparse
import copy
import dataclasses
import json

import pytest
import torch

from bench.cases import PROFILE, Shape
from bench.common import records
from bench.static import comparison, predict, roofline
from bench.static.comparison import compare_records
from bench.static.predict import compute_implied_tokens
from bench.static.roofline import Calls, Speed
from bench.static.traffic_record import TrafficCount, TrafficRecord
from model.config import preset

SHAPE = dict(B=4, segments=[256, 64], D=1024, H=8, F=3072, dtype="bfloat16", device="cpu")
# Passes (forward, backward) of the published code's eager fallback and of its kernels, by hand.
FALLBACK = {"rope": (49, 69), "qk_norm": (40, 88), "swiglu": (15, 39), "mvsplit_rmsnorm": (35, 82)}
PUBLISHED = {"rope": (4, 4), "qk_norm": (4, 6), "swiglu": (9, 15), "mvsplit_rmsnorm": (5, 8)}
ONE = {case.op: (1, 2) for case in PROFILE}
LAUNCHES = 3
CASE = {case.op: case for case in PROFILE}


def run(**changes):
    day = {"date": "2026-01-02T03:04:05+00:00", "commit": "abc", "torch": "2.13"}
    return {**day, "shape": SHAPE, **changes}


def make_counts(backend, passes):
    """Return the rows of a backend: a third of the passes is written, LAUNCHES per call."""
    shape = Shape()
    return [
        TrafficCount(op, op, d, backend, getattr(CASE[op], d)(shape), 2 * n / 3, n / 3, LAUNCHES, 0)
        for op, pair in passes.items()
        for d, n in zip(("fwd", "bwd"), pair, strict=True)
    ]


def make_traffic(**columns):
    rows = [row for backend, passes in columns.items() for row in make_counts(backend, passes)]
    return TrafficRecord(run(), rows, {})


def speed_of(bytes_per_second, launch_seconds=0.0):
    return Speed(bytes_per_second, "assumed", launch_seconds)


H100 = {"device": "NVIDIA H100 80GB HBM3", "threads": 4, "capability": [9, 0]}


def machine_record(**changes):
    return {"kind": "machine", "run": run(**{**H100, **changes}), "copy_bytes_per_second": 3e12}


def profile_record(**changes):
    fields = {"device": "A CPU", "threads": 2, "backend": "cpu", **changes}
    row = {
        **{"op": "swiglu", "title": "SwiGLU", "part_of": None},
        **{"forward_calls": 700, "backward_calls": 400, "bytes": [1, 1]},
        "seconds": {"eager": [4e-3, 8e-3], "compile": [1e-3, 1e-3], "fused": [1e-3, 2e-3]},
    }
    return {"kind": "profile", "run": run(**fields), "copy_bytes_per_second": 1e10, "rows": [row]}


def ops_record(**changes):
    fields = {"device": "NVIDIA H200", "threads": 4, "capability": [9, 0], **changes}
    columns = {
        "cuda": {"seconds": [1e-4, 2e-4, 3e-4], "host_seconds": 1e-5, "launches": None},
        "liger": {"failed": "swiglu, result 0"},
        "compile": {"seconds": [1e-4, 2e-4, 3e-4]},
    }
    record = {"kind": "ops", "op": "swiglu", "title": "SwiGLU", "columns": columns, "missing": {}}
    return {**record, "run": run(**fields), "copy_bytes_per_second": 4e12}


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Return a function that writes records to a folder in place of the committed ones."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)

    def write(*new_records):
        for record in new_records:
            records.append(record, tmp_path / "made.jsonl")
        return records.read_folder(tmp_path)

    return write


def run_command(capsys, *args):
    """Return the output of the command, with single spaces."""
    parser = argparse.ArgumentParser()
    predict.add_options(parser)
    predict.run_command(parser.parse_args(args))
    return " ".join(capsys.readouterr().out.split())


def test_a_step_takes_the_bytes_over_the_bandwidth_and_the_launches_of_its_calls():
    traffic = make_traffic(reference=ONE, cuda=ONE)
    predictions = predict.predict_step(traffic, 1000, speed_of(1e12, 5e-6), blocks=4)
    titles = [CASE[op].title for op in ("rope_qk_norm", "swiglu", "mvsplit_rmsnorm")]
    assert [row.title for row in predictions] == titles
    merge = predictions[-1]
    assert merge.calls == "14 / 8" and merge.launches["cuda"] == 22 * LAUNCHES
    moved = (14 * 1 + 8 * 2) * 1000 * 1024 * 2
    assert merge.ms["cuda"] == pytest.approx(1e3 * moved / 1e12 + 22 * LAUNCHES * 5e-3)
    assert merge.ms["eager"] == merge.ms["cuda"]
    floor = (14 * 3 + 8 * 5) * 1000 * 1024 * 2
    assert merge.ms["floor"] == pytest.approx(1e3 * floor / 1e12)
    assert not {"published", "triton"} & merge.ms.keys()


def test_an_operator_without_a_row_costs_the_sum_of_those_it_would_replace():
    traffic = make_traffic(published=PUBLISHED, reference=ONE)
    calls = [Calls("rope_qk_norm", "bwd")]
    moved, launches = roofline.compute_cost(traffic, "published", Shape(), calls)
    assert (moved, launches) == (pytest.approx(10 * Shape().pass_bytes), 2 * LAUNCHES)
    moved, launches = roofline.compute_cost(traffic, "eager", Shape(), calls)
    assert (moved, launches) == (pytest.approx(2 * Shape().pass_bytes), LAUNCHES)
    without = {op: pair for op, pair in PUBLISHED.items() if op != "rope"}
    assert not roofline.covers_step(make_traffic(published=without), "published")


def test_passes_grow_with_those_that_must_move():
    narrow = Shape(B=2, segments=(100,), D=512, F=512)
    traffic, calls = make_traffic(cuda=ONE), [Calls("swiglu", "fwd")]
    moved, _ = roofline.compute_cost(traffic, "cuda", narrow, calls)
    assert moved == pytest.approx(2 * 100 * 512 * 2 / 3)  # F / D is a third of the counted
    assert roofline.compute_cost(traffic, "cuda", narrow, [Calls("new_op", "fwd")]) is None


def test_the_papers_figures_imply_about_eight_thousand_tokens():
    traffic = make_traffic(reference=FALLBACK, published=PUBLISHED)
    speed = speed_of(0.8 * 3.35e12)
    shape = roofline.scale_to_tokens(traffic, 1)
    one_token = roofline.compute_cost(traffic, "eager", shape, roofline.step_calls(400))
    assert one_token.bytes == pytest.approx(265_900 * 2048, rel=1e-3)
    tokens = compute_implied_tokens(traffic, 1697.4, "eager", speed)
    assert 8_300 < tokens < 8_400
    predictions = predict.predict_step(traffic, tokens, speed)
    assert sum(row.ms["eager"] for row in predictions) == pytest.approx(1697.4, rel=1e-3)
    assert sum(row.ms["published"] for row in predictions) == pytest.approx(225, abs=2)
    assert sum(row.ms["floor"] for row in predictions) == pytest.approx(165, abs=2)


def test_launches_reduce_the_implied_tokens_or_leave_none():
    traffic = make_traffic(reference=FALLBACK)
    without, with_them, never = (
        compute_implied_tokens(traffic, 1697.4, "eager", speed_of(3e12, launch))
        for launch in (0, 2e-6, 1e-3)
    )
    assert with_them < without and never is None
    assert compute_implied_tokens(traffic, 614.0, "published", speed_of(3e12)) is None


def test_a_measured_bandwidth_has_precedence_over_the_datasheet(results):
    older = machine_record(date="2026-01-01T00:00:00+00:00")
    older["copy_bytes_per_second"] = 1e12
    others = [
        machine_record(device="NVIDIA GH200 480GB"),
        machine_record(device="NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
    ]
    stored = results(machine_record(), older, *others)
    h100 = roofline.find_speed("h100", stored)
    assert h100.bytes_per_second == 3e12
    assert h100.source.startswith("measured on NVIDIA H100 80GB HBM3 (made.jsonl, 2026-01-02")
    h200 = roofline.find_speed("h200", stored)
    assert h200.bytes_per_second == pytest.approx(0.9 * 4.8e12) and "datasheet" in h200.source


def test_a_backend_that_the_newest_count_lacks_comes_from_an_older_one_of_its_shape():
    old = dataclasses.replace(
        make_traffic(reference=ONE, published=PUBLISHED), run=run(date="2026-01-01T00:00:00+00:00")
    )
    other = make_traffic(reference=ONE, triton=ONE)
    other = dataclasses.replace(other, run=run(shape={**SHAPE, "B": 1}))
    part = make_traffic(reference={"swiglu": (100, 100)})
    newest = make_traffic(reference=FALLBACK, cuda=ONE)
    stored = [traffic.to_json() for traffic in (old, other, newest, part)]
    merged, sources = roofline.merge_newest_counts(stored)
    assert set(sources) == {"reference", "published", "cuda"}
    assert sources["published"]["date"] < sources["cuda"]["date"]
    eager = roofline.compute_cost(merged, "eager", Shape(), [Calls("swiglu", "fwd")])
    assert eager.bytes == pytest.approx(15 * Shape().pass_bytes)


def test_without_a_count_of_the_profile_one_line_names_the_command(results, capsys):
    results(profile_record(), make_traffic(cuda=ONE).to_json())
    with pytest.raises(ValueError, match="python -m bench traffic --json") as error:
        run_command(capsys)
    assert "\n" not in str(error.value)


def test_launches_cost_nothing_on_a_cpu():
    traffic = make_traffic(reference=FALLBACK, cpu=ONE)
    first, *others = compare_records([profile_record()], traffic, launch_seconds=1)
    assert [(c.measured.implementation, c.measured.direction) for c in (first, *others)] == [
        *[("eager", "fwd"), ("eager", "bwd"), ("cpu", "fwd"), ("cpu", "bwd")]
    ]
    predicted = 15 * Shape().pass_bytes / 1e10
    assert first.predicted_seconds == pytest.approx(predicted)
    assert first.measured.seconds == 4e-3 and first.ratio == pytest.approx(4e-3 / predicted)
    assert first.device == "A CPU, 2 threads" and first.source.startswith("profile, 2026")


def test_failed_and_uncounted_columns_are_left_out_and_launches_count_on_a_gpu():
    forward, backward = compare_records([ops_record()], make_traffic(cuda=ONE), launch_seconds=2e-6)
    assert {forward.measured.implementation, backward.measured.implementation} == {"cuda"}
    predicted = Shape().pass_bytes / 4e12 + LAUNCHES * 2e-6
    assert forward.predicted_seconds == pytest.approx(predicted)
    assert backward.measured.seconds == 2e-4 and backward.measured.direction == "bwd"


def test_records_of_another_dtype_are_not_compared():
    record = profile_record(shape={**SHAPE, "dtype": "float32"})
    assert compare_records([record, machine_record()], make_traffic(reference=ONE, cpu=ONE)) == []


def test_a_step_in_the_loop_is_compared_at_the_copy_bandwidth_of_its_machine():
    config = dataclasses.asdict(preset("tiny", batch=6, micro_batch=3, precision="bf16"))
    calls = {"forward_calls": 14, "backward_calls": 8, "forward_ms": 30.0, "backward_ms": 10.0}
    rows = [
        {"op": op, "title": CASE[op].title, "implementation": implementation, **calls}
        for op, implementation in (
            *(("swiglu", "cuda"), ("mvsplit_rmsnorm", "cuda")),
            ("rope", "compile"),
        )
    ]
    loop = {"kind": "in_loop", "run": run(**H100, preset="tiny", config=config), "rows": rows}
    loop |= {"step_ms": {}, "ranges_ms": {}}
    stored = [machine_record(), profile_record(), loop]
    (row,) = compare_records(stored, make_traffic(cuda=ONE), launch_seconds=1e-6)
    tiny = Shape(B=3, segments=(64, 4), D=64, H=4, F=192)
    moved = 2 * (14 + 8 * 2) * tiny.pass_bytes
    assert row.predicted_seconds == pytest.approx(moved / 3e12 + 2 * 22 * LAUNCHES * 1e-6)
    assert row.measured.seconds == pytest.approx(80e-3) and row.measured.direction == "step"
    assert compare_records([loop], make_traffic(cuda=ONE)) == []  # no record has the machine's copy


def test_the_newest_record_of_each_machine_shape_and_backend_is_selected():
    first, second = profile_record(date="2026-01-01T00:00:00+00:00"), profile_record()
    threads, backend = profile_record(threads=1), profile_record(backend="triton")
    sizes = ops_record(), ops_record(shape={**SHAPE, "B": 26})
    stored = [first, second, threads, backend, *sizes, copy.deepcopy(sizes[0])]
    newest = comparison.select_newest(stored)
    assert newest == [second, threads, backend, sizes[1], sizes[0]]


def test_the_command_prints_the_step_the_papers_figures_and_the_measurements(results, capsys):
    traffic = make_traffic(reference=FALLBACK, published=PUBLISHED, cuda=ONE, cpu=ONE)
    traffic.missing["triton"] = "it is not installed"
    old = profile_record(date="2026-01-01T00:00:00+00:00")
    results(old, traffic.to_json(), profile_record(), ops_record())
    text = run_command(capsys, "--gpu", "h200", "--launch-us", "0")
    assert (
        "H200, 8,320 tokens, 400 blocks" in text and "4.000 TB/s: measured on NVIDIA H200" in text
    )
    assert "made.jsonl, 2026-01-02" in text and "triton: it is not installed" in text
    assert "an H100's 3.015 TB/s" in text  # the paper's GPU, not that of --gpu
    assert "with bytes only: 9,4" in text and "with 0 us per launch" not in text
    assert "614.0 ms of its own kernels are 2.7" in text and "would imply" in text
    assert "A CPU, 2 threads" in text and text.count("SwiGLU") == 1 + 4 + 2
    assert run_command(capsys, "--all").count("SwiGLU") == 1 + 8 + 2


def test_the_command_that_counts_published_kernels_is_printed_if_they_are_not(results, capsys):
    results(make_traffic(reference=FALLBACK).to_json())
    text = run_command(capsys)
    assert "published: not counted in any committed record" in text
    assert text.count("python -m bench traffic --published PATH") == 2
    assert "614.0 ms of its own kernels have no prediction" in text


def test_the_committed_records_are_sufficient(capsys):
    text = run_command(capsys, "--tokens", "20000", "--blocks", "8")
    assert "20,000 tokens, 8 blocks" in text and "14 / 8" in text
    assert "Measured and predicted" in text


@pytest.mark.parametrize(
    "args", [["--gpu", "a100"], ["--launch-us", "-1"], ["--launch-us", "nan"], ["--tokens", "0"]]
)
def test_invalid_options_are_refused(args, capsys):
    with pytest.raises(SystemExit) as exit_code:
        run_command(capsys, *args)
    assert exit_code.value.code == 2 and args[0] in capsys.readouterr().err


def test_a_shape_can_be_read_from_its_record():
    described = {**dataclasses.asdict(Shape(B=3)), "dtype": "bfloat16"}
    record = json.loads(json.dumps({"shape": described}))
    assert roofline.read_shape(record) == Shape(B=3)
    assert roofline.scale_to_tokens(make_traffic(cuda=ONE), 77).pass_bytes == 77 * 1024 * 2
    assert roofline.read_shape(record).dtype == torch.bfloat16
