"""Bytes and launches of every operator, counted on every backend that runs on a CPU."""

import json
import math
import pathlib
import subprocess
import sys

import pytest
import torch

from bench.cases import CASES, Shape
from bench.common import records
from bench.static import traffic, traffic_record, triton_interpreter
from bench.static.byte_counter import ByteCounter, EagerCounter
from bench.static.traffic import Recorder
from bench.static.traffic_record import TrafficRecord

ROOT = pathlib.Path(__file__).parent.parent.parent
SMALL = Shape(B=1, segments=(20, 12), D=64, H=2, F=48)
BY_NAME = {case.op: case for case in CASES}

# Most passes that a call may load and store at the paper's shape, in all: forward, backward.
BUDGET = {
    "rope_qk_norm": (4.4, 6.5),
    "swiglu": (9.1, 15.1),
    "mvsplit_rmsnorm": (5.6, 8.0),
    "mvsplit_rmsnorm_with_mean": (4.7, 8.0),
    "residual_rmsnorm": (3.4, 5.5),
}
LAUNCHES = {
    "rope_qk_norm": (1, 1),
    "swiglu": (1, 1),
    "mvsplit_rmsnorm": (2, 3),
    "mvsplit_rmsnorm_with_mean": (2, 3),
    "residual_rmsnorm": (1, 2),
}


@pytest.fixture(autouse=True)
def interpreted():
    if torch.cuda.is_available():
        pytest.skip("Triton compiles its kernels in this process; python -m bench traffic counts")


def counter_without_repeats(read, written, launches):
    return ByteCounter(read, written, launches, tensors=read + written)


@pytest.mark.parametrize("op", BUDGET)
def test_triton_moves_no_more_than_its_budget(op):
    shape = Shape(B=4, segments=(256, 64))
    counted = traffic.count(BY_NAME[op], "triton", BY_NAME[op].example(shape))
    for direction, budget, launches in zip(("fwd", "bwd"), BUDGET[op], LAUNCHES[op], strict=True):
        counter = counted[direction]
        passes = (counter.read + counter.written) / shape.pass_bytes
        assert getattr(BY_NAME[op], direction)(shape) <= passes <= budget, (op, direction)
        assert counter.launches == launches  # PyTorch operations of a launcher would count too


@pytest.mark.parametrize("segments", [(37,), (5, 32), (7,) * 9], ids=str)
@pytest.mark.parametrize("op", ["mvsplit_rmsnorm", "mvsplit_rmsnorm_with_mean"])
def test_launches_do_not_depend_on_the_number_of_segments(op, segments):
    shape = Shape(B=2, segments=segments, D=64)
    counted = traffic.count(BY_NAME[op], "triton", BY_NAME[op].example(shape))
    assert (counted["fwd"].launches, counted["bwd"].launches) == (2, 3)


def test_a_carried_mean_saves_one_read_of_x():
    ops = "mvsplit_rmsnorm", "mvsplit_rmsnorm_with_mean"
    shape = Shape(B=1, segments=(48, 48), D=64)
    plain, carried = (
        traffic.count(BY_NAME[op], "triton", BY_NAME[op].example(shape)) for op in ops
    )
    means = 2 * 64 * 4  # float32, two segments
    partials = carried["fwd"].read - (plain["fwd"].read - shape.pass_bytes + means)
    assert 0 < partials <= 2 * 64 * 4 * 6 + 8 * 6  # column sums and tickets of six programs


def test_interpreted_kernels_are_counted_to_the_byte():
    x = torch.randn(3, 2 * 20, dtype=torch.bfloat16)
    from mvsplit_ops.triton_kernels.swiglu import swiglu_bwd, swiglu_fwd

    with triton_interpreter.count_bytes(ByteCounter()) as counted:
        swiglu_fwd(x, None, True)
    assert counted == counter_without_repeats(3 * 40 * 2, 3 * 20 * 2, 1)
    with triton_interpreter.count_bytes(counted):
        swiglu_bwd(x[:, :20], x, None, True)
    assert counted == counter_without_repeats(3 * (40 + 60) * 2, 3 * (20 + 40) * 2, 2)
    swiglu_fwd(x, None, True)
    assert counted.launches == 2  # not counted outside the block


def test_repeated_reads_of_a_launch_count_once_in_its_tensors():
    """RoPE's tables are loaded for each of the B samples."""
    shape = Shape(B=3, segments=(8,), D=64, H=2)
    case = BY_NAME["rope_qk_norm"]
    counted = traffic.count(case, "triton", case.example(shape))["fwd"]
    tables = 2 * shape.T * shape.Dh // 2 * 4
    assert counted.read + counted.written == counted.tensors + (shape.B - 1) * tables


def test_eager_operations_are_counted_and_views_are_not():
    x, row = torch.randn(4, 6), torch.randn(6)
    with EagerCounter(ByteCounter()) as eager:
        x.view(24).unsqueeze(0).t()
        torch.empty_like(x)
    assert eager.counter == ByteCounter()
    with EagerCounter(ByteCounter()) as eager:
        x + row.expand(4, 6)  # an expanded row is in memory once
    assert eager.counter == counter_without_repeats((24 + 6) * 4, 24 * 4, 1)


def test_cpu_counts_the_tensors_of_the_call():
    case = BY_NAME["swiglu"]
    counted = traffic.count(case, "cpu", case.example(SMALL))
    gate = SMALL.B * SMALL.T * SMALL.F * 2
    assert counted["fwd"] == counter_without_repeats(2 * gate, gate, 1)
    assert counted["bwd"] == counter_without_repeats(3 * gate, 2 * gate, 1)


def test_the_recorder_keeps_only_kernel_ops():
    with Recorder() as recorder:
        case = BY_NAME["swiglu"]
        case.fused("triton")(*case.example(SMALL))
        torch.ones(2) + 1
    ((op, args, result),) = recorder.calls
    assert traffic.split_kernel_op(op) == ("swiglu", "fwd")
    assert args[-1] == "triton" and result.shape == (1, 32, 48)


def test_a_record_has_every_backend_and_can_be_read_from_its_file(tmp_path):
    steps = []
    cases = [BY_NAME["swiglu"], BY_NAME["rope"]]
    record = traffic.measure(SMALL, lambda *step: steps.append(step), cases)
    assert {(r.op, r.backend, r.direction) for r in record.rows} == {
        (op, backend, direction)
        for op in ("swiglu", "rope")
        for backend in ("reference", "cpu", "triton", "cuda")
        for direction in ("fwd", "bwd")
    }
    assert len(steps) == steps[0][1] == 8
    assert not record.missing
    records.append(record.to_json(), tmp_path / "t.jsonl")
    read = TrafficRecord.from_json(json.loads((tmp_path / "t.jsonl").read_text()))
    assert (read.rows, read.missing) == (record.rows, record.missing)
    assert read.run["shape"]["segments"] == [20, 12]
    columns, rows, total = traffic_record.format_cells(record)
    assert columns == ("passes (launches)", "must move", "reference", "cpu", "triton", "cuda")
    swiglu = 3 * SMALL.F / SMALL.D
    assert rows[0][:2] == ("SwiGLU, fwd", f"{swiglu:g}")
    assert rows[0][4] == rows[0][5] == f"{swiglu:.2f} (1)"
    # RoPE is part of another operator and not in the total.
    assert total[1] == f"{700 * swiglu + 400 * 5 * SMALL.F / SMALL.D:,.0f}"


def test_the_interpreter_rounds_bfloat16_as_a_gpu_does():
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    special = [1.00390625, 1.01171875, -1.00390625, 3.4e38, 1e-39, 0.0, math.inf, -math.inf]
    t = torch.cat((torch.tensor(special), torch.randn(1000)))
    narrow = interpreter_builder.cast_impl(TensorHandle(t.numpy(), tl.float32), tl.bfloat16)
    expected = t.bfloat16()  # to nearest, ties to even
    assert torch.equal(torch.from_numpy(narrow.data.view("int16")), expected.view(torch.int16))
    back = interpreter_builder.cast_impl(narrow, tl.float32)
    assert torch.equal(torch.from_numpy(back.data), expected.float())


def test_the_command_prints_a_table_and_appends_a_record(tmp_path):
    file = tmp_path / "traffic.jsonl"
    command = [sys.executable, "-m", "bench", "traffic", "--op", "swiglu", "--batch", "1"]
    command += ["--tokens", "3,2", "--json", str(file)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "15.00 (1)" in process.stdout and "cuda" in process.stdout
    (record,) = map(json.loads, file.read_text().splitlines())
    assert record["kind"] == "traffic" and len(record["rows"]) == 8


def test_the_command_requires_the_folder_of_its_record(tmp_path):
    command = [sys.executable, "-m", "bench", "traffic", "--json", str(tmp_path / "no" / "f")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and "--json: no folder" in process.stderr


def test_a_process_that_compiles_triton_kernels_cannot_count():
    code = (
        "import sys, triton; from bench.static import triton_interpreter\n"
        "try: triton_interpreter.use()\n"
        "except RuntimeError as e: print(e)"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(pathlib.Path.home())}
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert "set TRITON_INTERPRET=1 before Python starts" in process.stdout, process.stderr
