import argparse
import copy
import dataclasses
import json

import pytest
import torch

from bench.cases import PROFILE, Shape
from bench.common import records
from bench.static import predict, roofline
from bench.static.predict import compare, implied_tokens
from bench.static.traffic import TrafficCount, TrafficRecord
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


def rows(backend, passes):
    """Of a TrafficRecord: a third of the passes written, three launches a call."""
    shape = Shape()
    return [
        TrafficCount(op, op, d, backend, getattr(CASE[op], d)(shape), 2 * n / 3, n / 3, LAUNCHES, 0)
        for op, pair in passes.items()
        for d, n in zip(("fwd", "bwd"), pair, strict=True)
    ]


def a_count(**columns):
    found = [row for backend, passes in columns.items() for row in rows(backend, passes)]
    return TrafficRecord(run(), found, {})


def machine(**changes):
    about = {"device": "NVIDIA H100 80GB HBM3", "threads": 4, "capability": [9, 0]}
    return {"kind": "machine", "run": run(**{**about, **changes}), "copy_bytes_per_second": 3e12}


def a_profile(**about):
    made = {"device": "A CPU", "threads": 2, "backend": "cpu", **about}
    seconds = {"eager": [4e-3, 8e-3], "compile": [1e-3, 1e-3], "fused": [1e-3, 2e-3]}
    row = {"op": "swiglu", "title": "SwiGLU", "part_of": None, "seconds": seconds}
    return {"kind": "profile", "run": run(**made), "copy_bytes_per_second": 1e10, "rows": [row]}


def an_ops(**about):
    made = {"device": "NVIDIA H200", "threads": 4, "capability": [9, 0], **about}
    columns = {
        "cuda": {"seconds": [1e-4, 2e-4, 3e-4], "host_seconds": 1e-5, "launches": None},
        "liger": {"failed": "swiglu, result 0"},
        "compile": {"seconds": [1e-4, 2e-4, 3e-4]},
    }
    what = {"kind": "ops", "op": "swiglu", "title": "SwiGLU", "columns": columns, "missing": {}}
    return {**what, "run": run(**made), "copy_bytes_per_second": 4e12}


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Writes records where the committed ones would be."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)

    def write(*found, file="made.jsonl"):
        for record in found:
            records.append(record, tmp_path / file)
        return records.read_folder(tmp_path)

    return write


def shown(capsys, *args):
    p = argparse.ArgumentParser()
    predict.options(p)
    predict.command(p.parse_args(args))
    return " ".join(capsys.readouterr().out.split())


def test_a_step_is_calls_times_bytes_over_bandwidth_and_launches():
    made = predict.predict(a_count(reference=ONE, cuda=ONE), 1000, 1e12, 5e-6, blocks=4)
    assert [row.op for row in made] == ["rope_qk_norm", "swiglu", "mvsplit_rmsnorm"]
    merge = made[-1]
    assert merge.calls == (14, 8) and merge.launches["cuda"] == 22 * LAUNCHES
    moved = (14 * 1 + 8 * 2) * 1000 * 1024 * 2
    assert merge.ms["cuda"] == pytest.approx(1e3 * moved / 1e12 + 22 * LAUNCHES * 5e-3)
    assert merge.ms["eager"] == merge.ms["cuda"]
    floor = (14 * 3 + 8 * 5) * 1000 * 1024 * 2
    assert merge.ms["floor"] == pytest.approx(1e3 * floor / 1e12)
    assert not {"published", "triton"} & merge.ms.keys()


def test_an_operator_without_a_row_is_the_sum_of_those_it_would_replace():
    count = a_count(published=PUBLISHED, reference=ONE)
    moved, launches = roofline.call_cost(count, "rope_qk_norm", "bwd", "published", Shape())
    assert (moved, launches) == (pytest.approx(10 * Shape().pass_bytes), 2 * LAUNCHES)
    moved, launches = roofline.call_cost(count, "rope_qk_norm", "bwd", "eager", Shape())
    assert (moved, launches) == (pytest.approx(2 * Shape().pass_bytes), LAUNCHES)
    without = {op: pair for op, pair in PUBLISHED.items() if op != "rope"}
    assert not roofline.counts_profile(a_count(published=without), "published")


def test_passes_grow_with_those_that_must_move():
    narrow = Shape(B=2, segments=(100,), D=512, F=512)
    moved, _ = roofline.call_cost(a_count(cuda=ONE), "swiglu", "fwd", "cuda", narrow)
    assert moved == pytest.approx(2 * 100 * 512 * 2 / 3)  # F / D is a third of the counted
    assert roofline.call_cost(a_count(cuda=ONE), "new_op", "fwd", "cuda", narrow) is None


def test_the_papers_figures_imply_about_eight_thousand_tokens():
    count = a_count(reference=FALLBACK, published=PUBLISHED)
    speed = 0.8 * 3.35e12
    assert roofline.step_cost(count, "eager", roofline.at_tokens(count, 1), 400)[
        0
    ] == pytest.approx(265_900 * 2048, rel=1e-3)
    tokens = implied_tokens(count, 1697.4, "eager", speed, 0)
    assert 8_300 < tokens < 8_400
    made = predict.predict(count, tokens, speed, 0)
    assert sum(row.ms["eager"] for row in made) == pytest.approx(1697.4, rel=1e-3)
    assert sum(row.ms["published"] for row in made) == pytest.approx(225, abs=2)
    assert sum(row.ms["floor"] for row in made) == pytest.approx(165, abs=2)


def test_launches_leave_fewer_tokens_or_none():
    count = a_count(reference=FALLBACK)
    without, with_them, never = (
        implied_tokens(count, 1697.4, "eager", 3e12, launch) for launch in (0, 2e-6, 1e-3)
    )
    assert with_them < without and never is None
    assert implied_tokens(count, 614.0, "published", 3e12, 0) is None


def test_a_measured_bandwidth_goes_before_the_datasheets(results):
    older = machine(date="2026-01-01T00:00:00+00:00")
    older["copy_bytes_per_second"] = 1e12
    others = [
        machine(device="NVIDIA GH200 480GB"),
        machine(device="NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
    ]
    h100 = machine()
    found = results(h100, older, *others)
    assert roofline.bandwidth("h100", found).bytes_per_second == 3e12
    source = roofline.bandwidth("h100", found).source
    assert source.startswith("measured on NVIDIA H100 80GB HBM3 (made.jsonl, 2026-01-02")
    h200 = roofline.bandwidth("h200", found)
    assert h200.bytes_per_second == pytest.approx(0.9 * 4.8e12) and "datasheet" in h200.source


def test_a_column_that_the_newest_count_lacks_is_that_of_an_older_of_its_shape():
    old = dataclasses.replace(
        a_count(reference=ONE, published=PUBLISHED), run=run(date="2026-01-01T00:00:00+00:00")
    )
    other = a_count(reference=ONE, triton=ONE)
    other = dataclasses.replace(other, run=run(shape={**SHAPE, "B": 1}))
    part = a_count(reference={"swiglu": (100, 100)})
    newest = a_count(reference=FALLBACK, cuda=ONE)
    found = [c.to_json() for c in (old, other, newest, part)]
    count, sources = roofline.newest_count(found)
    assert set(sources) == {"reference", "published", "cuda"}
    assert sources["published"]["date"] < sources["cuda"]["date"]
    eager = roofline.call_cost(count, "swiglu", "fwd", "eager", Shape())[0]
    assert eager == pytest.approx(15 * Shape().pass_bytes)


def test_without_a_count_of_the_profile_one_line_names_the_command(results, capsys):
    results(a_profile(), a_count(cuda=ONE).to_json())
    with pytest.raises(ValueError, match="python -m bench traffic --json") as error:
        shown(capsys)
    assert "\n" not in str(error.value)


def test_a_profile_on_a_cpu_is_compared_without_a_cost_of_launches():
    found = compare([a_profile()], a_count(reference=FALLBACK, cpu=ONE), launch_seconds=1)
    assert [(r.implementation, r.direction) for r in found] == [
        *[("eager", "fwd"), ("eager", "bwd"), ("cpu", "fwd"), ("cpu", "bwd")]
    ]
    predicted = 15 * Shape().pass_bytes / 1e10
    assert found[0].predicted_seconds == pytest.approx(predicted)
    assert found[0].measured_seconds == 4e-3 and found[0].ratio == pytest.approx(4e-3 / predicted)
    assert found[0].device == "A CPU, 2 threads" and found[0].source.startswith("profile, 2026")


def test_on_a_gpu_launches_count_and_what_failed_or_was_not_counted_is_left_out():
    forward, backward = compare([an_ops()], a_count(cuda=ONE), launch_seconds=2e-6)
    assert {forward.implementation, backward.implementation} == {"cuda"}
    predicted = Shape().pass_bytes / 4e12 + LAUNCHES * 2e-6
    assert forward.predicted_seconds == pytest.approx(predicted)
    assert backward.measured_seconds == 2e-4 and backward.direction == "bwd"


def test_another_dtype_than_the_counted_is_not_compared():
    record = a_profile(shape={**SHAPE, "dtype": "float32"})
    assert compare([record, machine()], a_count(reference=ONE, cpu=ONE)) == []


def test_a_loop_is_compared_by_its_calls_at_the_copy_of_its_machine():
    config = dataclasses.asdict(preset("tiny", batch=6, micro_batch=3, precision="bf16"))
    about = {"device": "NVIDIA H100 80GB HBM3", "threads": 4, "capability": [9, 0]}
    calls = {"forward_calls": 14, "backward_calls": 8, "forward_ms": 30.0, "backward_ms": 10.0}
    made = [{"op": op, "implementation": "cuda", **calls} for op in ("swiglu", "mvsplit_rmsnorm")]
    made += [{"op": "rope", "implementation": "compile", **calls}]
    loop = {"kind": "in_loop", "run": run(**about, preset="tiny", config=config), "rows": made}
    (row,) = compare([machine(), a_profile(), loop], a_count(cuda=ONE), launch_seconds=1e-6)
    tiny = Shape(B=3, segments=(64, 4), D=64, H=4, F=192)
    moved = 2 * (14 + 8 * 2) * tiny.pass_bytes
    assert row.predicted_seconds == pytest.approx(moved / 3e12 + 2 * 22 * LAUNCHES * 1e-6)
    assert row.measured_seconds == pytest.approx(80e-3) and row.direction == "step"
    assert compare([loop], a_count(cuda=ONE)) == []  # nobody measured the machine's copy


def test_the_newest_of_each_machine_shape_and_backend_is_kept():
    first, second = a_profile(date="2026-01-01T00:00:00+00:00"), a_profile()
    threads, backend = a_profile(threads=1), a_profile(backend="triton")
    sizes = an_ops(), an_ops(shape={**SHAPE, "B": 26})
    kept = predict.newest([first, second, threads, backend, *sizes, copy.deepcopy(sizes[0])])
    assert kept == [second, threads, backend, sizes[1], sizes[0]]


def test_the_command_shows_the_step_the_papers_figures_and_the_measurements(results, capsys):
    counted = a_count(reference=FALLBACK, published=PUBLISHED, cuda=ONE, cpu=ONE)
    counted.missing["triton"] = "it is not installed"
    old = a_profile(date="2026-01-01T00:00:00+00:00")
    results(old, counted.to_json(), a_profile(), an_ops())
    text = shown(capsys, "--gpu", "h200", "--launch-us", "0")
    assert (
        "H200, 8,320 tokens, 400 blocks" in text and "4.000 TB/s: measured on NVIDIA H200" in text
    )
    assert "made.jsonl, 2026-01-02" in text and "triton: it is not installed" in text
    assert "an H100's 3.015 TB/s" in text  # the paper's GPU, not the one asked for
    assert "by bytes alone: 9,4" in text and "at 0 us a launch" not in text
    assert "614.0 ms of its kernels are 2.7" in text and "would imply" in text
    assert "A CPU, 2 threads" in text and text.count("SwiGLU") == 1 + 4 + 2
    assert shown(capsys, "--all").count("SwiGLU") == 1 + 8 + 2


def test_published_kernels_that_nobody_counted_are_told_with_the_command(results, capsys):
    results(a_count(reference=FALLBACK).to_json())
    text = shown(capsys)
    assert "published: no committed record has counted it" in text
    assert text.count("python -m bench traffic --published PATH") == 2
    assert "614.0 ms of its kernels stand beside no prediction" in text


def test_the_committed_records_are_enough(capsys):
    text = shown(capsys, "--tokens", "20000", "--blocks", "8")
    assert "20,000 tokens, 8 blocks" in text and "14 / 8" in text
    assert "Measured beside predicted" in text


@pytest.mark.parametrize(
    "args", [["--gpu", "a100"], ["--launch-us", "-1"], ["--launch-us", "nan"], ["--tokens", "0"]]
)
def test_bad_options_are_refused(args, capsys):
    with pytest.raises(SystemExit) as exit_code:
        shown(capsys, *args)
    assert exit_code.value.code == 2 and args[0] in capsys.readouterr().err


def test_a_shape_survives_its_record():
    described = {**dataclasses.asdict(Shape(B=3)), "dtype": "bfloat16"}
    record = json.loads(json.dumps({"shape": described}))
    assert roofline.shape_of(record) == Shape(B=3)
    assert roofline.at_tokens(a_count(cuda=ONE), 77).pass_bytes == 77 * 1024 * 2
    assert roofline.shape_of(record).dtype == torch.bfloat16
