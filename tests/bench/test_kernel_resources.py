"""Resources of compiled kernels: occupancy computed by hand, the record and its table."""

import io
import json

import pytest
import torch
from rich.console import Console

from bench.__main__ import main
from bench.cases import CASES, Shape
from bench.common import records
from bench.static import kernel_compiler, kernel_resources
from bench.static.kernel_compiler import CompiledKernel, record_kernel_ops
from bench.static.kernel_resources import ResourceRecord
from bench.static.occupancy import RESIDENCY, Occupancy, compute_occupancy, get_limits
from mvsplit_ops._cuda import catalogue
from mvsplit_ops._cuda.launch import LIMITS

SWIGLU = [case for case in CASES if case.op == "swiglu"]
MERGE = [case for case in CASES if case.op == "mvsplit_rmsnorm"]

# Architecture, registers, threads, shared; blocks per SM, their limit, share of the SM's warps.
BY_HAND = [
    (80, 32, 256, 0, 8, "threads", 1.0),  # 2048 / 256; as many by registers
    (90, 92, 128, 0, 5, "registers", 20 / 64),  # 96 * 32 a warp: 5 of 16384, 20 of the SM
    (90, 80, 256, 69696, 3, "registers", 24 / 64),  # 24 warps; 233472 / 70784 is 3 as well
    (90, 118, 256, 103488, 2, "registers", 16 / 64),  # 120 * 32 a warp: 4 of 16384
    (86, 108, 128, 24640, 3, "shared memory", 12 / 48),  # 102400 / 25728; 4 by registers
    (80, 32, 32, 0, 32, "blocks", 32 / 64),
    (86, 32, 64, 0, 16, "blocks", 32 / 48),
    (89, 32, 64, 0, 24, "threads", 1.0),
    (120, 40, 256, 0, 6, "threads", 1.0),
    (100, 32, 128, 50000, 4, "shared memory", 16 / 64),  # 51072 per block of 233472
    (80, 16, 64, 8192, 18, "shared memory", 36 / 64),  # 9216 per block of 167936
    (80, 80, 32, 0, 24, "registers", 24 / 64),  # 6 warps per partition, not 25 of the SM
    (90, 64, 1000, 0, 1, "registers", 32 / 64),  # 32 warps of 2048
    (90, 128, 1024, 0, 0, "registers", 0.0),  # 16 warps fit
    (86, 32, 128, 100 << 10, 0, "shared memory", 0.0),  # a block may have 99 KB
    (90, 32, 1056, 0, 0, "threads", 0.0),
    (90, 256, 32, 0, 0, "registers", 0.0),
]


@pytest.mark.parametrize("case", BY_HAND, ids=str)
def test_occupancy_agrees_with_the_calculation_by_hand(case):
    *resources, blocks, limited_by, warps_share = case
    assert compute_occupancy(*resources) == Occupancy(blocks, limited_by, warps_share)


def test_occupancy_knows_every_architecture_of_the_launchers():
    assert {get_limits(architecture).architecture for architecture in RESIDENCY} == set(LIMITS)


@pytest.fixture(scope="module")
def record():
    return kernel_resources.measure(Shape(), ["cuda"], (80, 90), cases=[*SWIGLU, *MERGE])


def test_every_launch_of_the_cuda_backend_has_a_row(record):
    sweeps = "sweep_reduce", "sweep_units", "sweep_gradients", "sum_rows"
    assert [(row.call, row.name, row.architecture) for row in record.rows] == [
        *(("swiglu fwd", "swiglu_fwd", 80), ("swiglu fwd", "swiglu_fwd", 90)),
        *(("swiglu bwd", "swiglu_bwd", 80), ("swiglu bwd", "swiglu_bwd", 90)),
        *(("mvsplit_rmsnorm fwd", name, 80) for name in ("sweep_means", "sweep_apply")),
        ("mvsplit_rmsnorm fwd", "cluster_fwd", 90),
        *(("mvsplit_rmsnorm bwd", name, 80) for name in sweeps),
        *(("mvsplit_rmsnorm bwd", name, 90) for name in ("cluster_bwd", "sum_rows")),
    ]


def test_a_row_describes_the_launch_and_the_compiled_kernel(record):
    (row,) = (row for row in record.rows if row.name == "cluster_bwd")
    with catalogue.record_launches("sm_90a") as recorder:
        for op, args in record_kernel_ops(MERGE[0], Shape()):
            getattr(catalogue._cuda, op.__name__.split(".")[0])(*args)
    (launch,) = (launch for _, launch in recorder.launches if launch.kernel == "cluster_bwd")
    assert (row.threads, row.cluster) == (launch.block, launch.cluster)
    assert row.shared == launch.shared and row.spilled == 0
    assert row.registers <= 65536 // (2 * launch.block)  # two blocks, as the kernel asks
    assert row.loads[128] and row.stores[128]
    occupancy = compute_occupancy(90, row.registers, row.threads, row.shared)
    assert row.blocks_per_sm == occupancy.blocks_per_sm >= 1


def test_a_record_can_be_read_from_its_json(record):
    assert ResourceRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def render_table(record):
    console = Console(width=190, file=io.StringIO())
    console.print(kernel_resources.make_table(record).to_terminal())
    return console.file.getvalue()


def test_the_table_has_every_kernel_and_names_missing_backends(record):
    missing = {"triton": "it is not installed"}
    text = render_table(ResourceRecord(record.run, record.rows, missing))
    assert "triton: it is not installed" in text and "compiled by NVRTC" in text
    (line,) = (line for line in text.splitlines() if "cluster_bwd" in line)
    assert [c.strip() for c in line.strip("│ ").split("│")][:5] == [
        *("mvsplit_rmsnorm bwd", "cuda", "cluster_bwd", "90", "256"),
    ]


def test_the_widest_rows_fit_on_a_line():
    sizes = 100, 256, 128, 0, 103488, 16
    widest = CompiledKernel(
        *("mvsplit_rmsnorm_with_mean bwd", "triton", "sweep_gradients", *sizes),
        *({128: 94, 32: 31}, {128: 10, 32: 29}, 0, 0.1, 2, "shared memory", 0.5),
    )
    run = {"shape": vars(Shape(dtype=torch.bfloat16)), "triton": "3.5", "cuda_compiler": None}
    record = ResourceRecord(run, [widest], {})
    (row,) = (line for line in render_table(record).splitlines() if "sweep_gradients" in line)
    assert "mvsplit_rmsnorm_with_mean bwd" in row and "128x94 32x31" in row


def test_the_command_appends_a_record_with_the_same_table(tmp_path, capsys):
    file = tmp_path / "resources.jsonl"
    command = ["resources", "--op", "swiglu", "--arch", "90", "--backend", "cuda"]
    assert main([*command, "--json", str(file)]) == 0
    (stored,) = records.read(file)
    assert stored["kind"] == "resources" and stored["run"]["shape"]["dtype"] == "bfloat16"
    out = capsys.readouterr().out
    for cells in kernel_resources.format_cells(ResourceRecord.from_json(stored)):
        assert all(cell in out for cell in cells)


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        (["--op", "gelu"], "'swiglu'"),
        (["--arch", "91"], "80, 86, 89, 90, 100, 120"),
        (["--backend", "vulkan"], "'triton', 'cuda'"),
    ],
)
def test_the_error_of_an_unknown_choice_lists_the_choices(option, choices, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["resources", *option])
    assert exit.value.code == 2 and choices in capsys.readouterr().err


def test_kernels_of_the_other_backend_are_listed_if_one_is_missing(monkeypatch):
    monkeypatch.setattr(kernel_compiler, "_interpreter_reason", lambda: "Triton interprets")
    record = kernel_resources.measure(Shape(), architectures=(90,), cases=SWIGLU)
    assert record.missing == {"triton": "Triton interprets"}
    assert {row.backend for row in record.rows} == {"cuda"}
