"""What kernels take of a GPU: occupancy by hand, CUDA kernels as compiled, the table, records."""

import importlib.util
import io
import shutil

import pytest
import torch
from rich.console import Console

from bench.__main__ import main
from bench.cases import CASES, Shape
from bench.common import records
from bench.static import kernel_resources, machine_code, occupancy
from mvsplit_ops._cuda import catalogue, compile
from mvsplit_ops._cuda.launch import LIMITS, Program

SWIGLU = [case for case in CASES if case.op == "swiglu"]
MERGE = [case for case in CASES if case.op == "mvsplit_rmsnorm"]

# architecture, registers, threads, shared; blocks an SM, what limits them, share of its warps.
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
    (100, 32, 128, 50000, 4, "shared memory", 16 / 64),  # 51072 a block of 233472
    (80, 16, 64, 8192, 18, "shared memory", 36 / 64),  # 9216 a block of 167936
    (80, 80, 32, 0, 24, "registers", 24 / 64),  # 6 warps a partition, not 25 of the SM
    (90, 64, 1000, 0, 1, "registers", 32 / 64),  # 32 warps of 2048
    (90, 128, 1024, 0, 0, "registers", 0.0),  # 16 warps fit
    (86, 32, 128, 100 << 10, 0, "shared memory", 0.0),  # a block may have 99 KB
    (90, 32, 1056, 0, 0, "threads", 0.0),
    (90, 256, 32, 0, 0, "registers", 0.0),
]


@pytest.mark.parametrize("case", BY_HAND, ids=str)
def test_blocks_an_sm_are_those_worked_out_by_hand(case):
    *takes, blocks, limited_by, warps_share = case
    assert occupancy.blocks_per_sm(*takes) == blocks
    assert occupancy.limited_by(*takes) == limited_by
    assert occupancy.warps_share(takes[0], takes[2], blocks) == warps_share


def test_every_architecture_of_the_launchers_has_its_limits():
    found = {occupancy.limits(architecture).architecture for architecture in occupancy.SMS}
    assert found == set(LIMITS)


@pytest.fixture(scope="module")
def record():
    return kernel_resources.measure(Shape(), ["cuda"], (80, 90), cases=[*SWIGLU, *MERGE])


def test_every_launch_of_the_cuda_backend_is_a_row(record):
    found = [(r["call"], r["name"], r["architecture"]) for r in record["rows"]]
    sweeps = "sweep_reduce", "sweep_units", "sweep_gradients", "sum_rows"
    assert found == [
        *(("swiglu fwd", "swiglu_fwd", 80), ("swiglu fwd", "swiglu_fwd", 90)),
        *(("swiglu bwd", "swiglu_bwd", 80), ("swiglu bwd", "swiglu_bwd", 90)),
        *(("mvsplit_rmsnorm fwd", name, 80) for name in ("sweep_means", "sweep_apply")),
        ("mvsplit_rmsnorm fwd", "cluster_fwd", 90),
        *(("mvsplit_rmsnorm bwd", name, 80) for name in sweeps),
        *(("mvsplit_rmsnorm bwd", name, 90) for name in ("cluster_bwd", "sum_rows")),
    ]


def test_a_row_holds_the_launch_and_the_compiled_kernel(record):
    (row,) = (r for r in record["rows"] if r["name"] == "cluster_bwd")
    with catalogue.recording("sm_90a") as recorder:
        for op, args in machine_code.launches_of(MERGE[0], Shape()):
            getattr(catalogue._cuda, op.__name__.split(".")[0])(*args)
    (launch,) = (launch for _, launch in recorder.launches if launch.kernel == "cluster_bwd")
    assert (row["threads"], row["cluster"]) == (launch.block, launch.cluster)
    assert row["shared"] == launch.shared and row["spilled"] == 0
    assert row["registers"] <= 65536 // (2 * launch.block)  # two blocks, as the kernel asks
    assert row["loads"][128] and row["stores"][128]
    takes = 90, row["registers"], row["threads"], row["shared"]
    assert row["blocks_per_sm"] == occupancy.blocks_per_sm(*takes) >= 1


def test_a_kernel_that_two_calls_share_is_a_row_of_each():
    rope = [case for case in CASES if case.op == "rope"]
    kernels = machine_code.measure(Shape(), ["cuda"], (90,), cases=rope)
    assert [k.call for k in kernels] == ["rope fwd", "rope bwd"]
    assert kernels[0].seconds == kernels[1].seconds > 0


@pytest.mark.parametrize(("architecture", "name"), [(80, "sm_80"), (90, "sm_90a")])
def test_static_shared_memory_is_what_the_kernel_declares(
    architecture, name, tmp_path, monkeypatch
):
    body = "__shared__ float s[100]; s[threadIdx.x] = *x; __syncthreads(); *x = s[*x > 0];"
    source = f'extern "C" __global__ void some(float* x) {{ {body} }}\n'
    source += 'extern "C" __global__ void none(float* x) { *x = 1; }\n'
    (tmp_path / "shared.cu").write_text(source)
    monkeypatch.setattr(compile, "SOURCES", tmp_path)
    found = machine_code.resources(machine_code.compiler().compile(Program("shared", ()), name))
    assert machine_code.static_shared(found["some"], architecture) == 400
    assert machine_code.static_shared(found["none"], architecture) == 0


def test_widths_are_read_from_machine_code():
    code = """
        /*0100*/ LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;
        /*0110*/ @!P0 LDG.E R8, desc[UR6][R2.64+0x40] ;
        /*0120*/ LDG.E.U16.CONSTANT R9, [R2.64] ;
        /*0130*/ LDGSTS.E.BYPASS.LTC128B.128 [R5], [R2.64] ;
        /*0140*/ LDGSTSBAR.64.ARVCNT [UR4] ;
        /*0150*/ LDS.128 R12, [R5] ;
        /*0160*/ STG.E.64 desc[UR6][R2.64], R8 ;
        /*0170*/ UBLKCP.S.G [UR8], [UR10], UR12 ;
        /*0180*/ UBLKCP.G.S [UR8], [UR10], UR12 ;
    """
    assert machine_code.sass_widths(code, "LD") == {128: 2, 32: 1, 16: 1}
    assert machine_code.sass_widths(code, "ST") == {64: 1}
    assert machine_code.bulk_copies(code) == 1
    ptx = """
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], 4, [%r2];
        cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 4;
    """
    assert machine_code.bulk_copies(ptx) == 1


def test_rows_of_short_segments_come_by_bulk_copies():
    kernels = machine_code.measure(Shape(segments=(16,)), ["cuda"], (90,), cases=MERGE)
    assert {k.name for k in kernels if k.bulk} == {"cluster_fwd", "cluster_bwd"}


def shown(record):
    console = Console(width=190, file=io.StringIO())
    console.print(kernel_resources.table(record))
    return console.file.getvalue()


def test_the_table_shows_every_kernel_and_says_what_is_missing(record):
    text = shown({**record, "missing": {"triton": "it is not installed"}})
    assert "triton: it is not installed" in text and "compiled by NVRTC" in text
    (line,) = (line for line in text.splitlines() if "cluster_bwd" in line)
    assert [c.strip() for c in line.strip("│ ").split("│")][:5] == [
        *("mvsplit_rmsnorm bwd", "cuda", "cluster_bwd", "90", "256"),
    ]


def test_the_widest_rows_fit_a_line():
    takes = 100, 256, 128, 0, 103488, 16
    widest = machine_code.Kernel(
        *("mvsplit_rmsnorm_with_mean bwd", "triton", "sweep_gradients", *takes),
        *({128: 94, 32: 31}, {128: 10, 32: 29}, 0, 0.1),
    )
    run = {"shape": vars(Shape(dtype=torch.bfloat16)), "triton": "3.5", "cuda_compiler": None}
    record = {"run": run, "rows": [kernel_resources.row(widest)], "missing": {}}
    (row,) = (line for line in shown(record).splitlines() if "sweep_gradients" in line)
    assert "mvsplit_rmsnorm_with_mean bwd" in row and "128x94 32x31" in row


def test_the_command_adds_a_record_that_shows_the_same_table(tmp_path, capsys):
    file = tmp_path / "found.jsonl"
    command = ["resources", "--op", "swiglu", "--arch", "90", "--backend", "cuda"]
    assert main([*command, "--json", str(file)]) == 0
    (kept,) = records.read(file)
    assert kept["kind"] == "resources" and kept["run"]["shape"]["dtype"] == "bfloat16"
    out = capsys.readouterr().out
    for cells in kernel_resources.cells(kept):
        assert all(cell in out for cell in cells)


@pytest.mark.parametrize(
    ("option", "known"),
    [
        (["--op", "gelu"], "'swiglu'"),
        (["--arch", "91"], "80, 86, 89, 90, 100, 120"),
        (["--backend", "vulkan"], "'triton', 'cuda'"),
    ],
)
def test_an_unknown_choice_is_told_with_those_that_exist(option, known, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["resources", *option])
    assert exit.value.code == 2 and known in capsys.readouterr().err


@pytest.fixture
def interpreting(monkeypatch):
    monkeypatch.setattr(machine_code, "_interpreting", lambda: "Triton interprets")


@pytest.fixture
def no_nvrtc(monkeypatch):
    def absent():
        raise RuntimeError("NVRTC does not load")

    monkeypatch.setattr(compile, "nvrtc", absent)


def test_a_backend_that_cannot_be_compiled_is_told_beside_the_other(interpreting):
    record = kernel_resources.measure(Shape(), architectures=(90,), cases=SWIGLU)
    assert record["missing"] == {"triton": "Triton interprets"}
    assert {r["backend"] for r in record["rows"]} == {"cuda"}


def test_without_nvrtc_nvcc_compiles(no_nvrtc, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/toolkit/{name}")
    monkeypatch.setattr(compile, "nvcc", lambda: "nvcc")
    assert machine_code.compiler() == "nvcc"


def test_without_any_compiler_there_is_one_error(interpreting, no_nvrtc, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["resources", "--op", "swiglu"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "python -m bench resources: no kernel can be compiled here: triton: Triton interprets; "
        "cuda: NVRTC does not load; or put nvcc on the PATH"
    )


def test_an_architecture_that_the_compiler_does_not_know_is_a_reason(monkeypatch):
    monkeypatch.setattr(compile.nvrtc(), "architectures", {80})
    assert machine_code.missing("cuda", (80,)) is None
    assert "cannot compile for sm_90a" in machine_code.missing("cuda", (80, 90))


def test_without_triton_its_kernels_are_missing_and_tools_are_those_of_a_toolkit(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "cuobjdump" in machine_code.missing("cuda", (90,))
    monkeypatch.setattr(shutil, "which", lambda name: f"/toolkit/{name}")
    assert machine_code.missing("cuda", (90,)) is None
