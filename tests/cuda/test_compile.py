"""Registers, spills and access widths of csrc/cuda, compiled by NVRTC; no GPU is needed."""

import re

import pytest
import torch

from bench.static.machine_code import disassemble, read_resources
from mvsplit_ops import _cuda
from mvsplit_ops._cuda import catalogue, compile, mvsplit_rmsnorm
from mvsplit_ops._cuda.launch import LIMITS

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
REGISTERS = 65536  # of an SM
# Kernels that only add partial sums, one column per thread.
SUM_KERNELS = {"sum_rows", "sweep_units"}


def every_option(dtype):
    """Call the operators with the options that the paper's model does not use."""
    x, gain = torch.empty(2, 320, 1024, dtype=dtype), torch.empty(1024, dtype=torch.float32)
    merge = x, x, gain, gain, gain.to(dtype)
    for jx, carry in ((None, False), (torch.empty(2, 2, 1024), True)):
        y, _, rstd, new_jx, jf = _cuda.mvsplit_rmsnorm_fwd(*merge, jx, (256, 64), 1e-5, carry)
    jx = new_jx if jx is None else jx
    _cuda.mvsplit_rmsnorm_bwd(y, *merge, rstd, jx, jf, (256, 64))
    for scale in (None, gain):
        y, rstd = _cuda.residual_rmsnorm_fwd(x, x, scale, gain, 1e-5)
        _cuda.residual_rmsnorm_bwd(y, x, x, scale, gain, rstd)
    q, cos = torch.empty(2, 320, 8, 128, dtype=dtype), torch.empty(320, 64)
    for interleaved in (False, True):
        _cuda.rope_fwd(q, cos, cos, interleaved, True)
        for norm_first in (False, True):
            flags = interleaved, False, norm_first
            for weight in (None, torch.empty(128)):
                _, _, *rstds = _cuda.rope_qk_norm_fwd(q, q, cos, cos, weight, weight, 1e-6, *flags)
                _cuda.rope_qk_norm_bwd(q, q, q, q, cos, cos, *rstds, weight, weight, *flags)


def programs(architecture, dtype):
    """Return {Program: {kernel: Launch}}: every option, and in bfloat16 all common shapes."""
    launches = catalogue.list_launches(architecture) if dtype == torch.bfloat16 else []
    with catalogue.record_launches(architecture) as recorder, torch.device("meta"):
        every_option(dtype)
    kernels = {}
    for program, launch in (*launches, *recorder.launches):
        kernels.setdefault(program, {})[launch.kernel] = launch
    return kernels


# float16 has the size of bfloat16, so one architecture is enough.
CASES = [(a, d) for a in ARCHITECTURES for d in (torch.bfloat16, torch.float32)]
CASES.append(("sm_90a", torch.float16))


@pytest.mark.parametrize(("architecture", "dtype"), CASES, ids=str)
def test_kernels_do_not_spill_use_wide_accesses_and_leave_room_for_their_blocks(
    architecture, dtype
):
    wrong = []
    for program, launches in programs(architecture, dtype).items():
        cubin = compile.nvrtc().compile(program, architecture)
        used, code = read_resources(cubin), disassemble(cubin)
        for kernel, launch in launches.items():
            plain = "WEIGHT=0" in program.defines
            fault = find_fault(used[kernel], code[kernel], launch, LIMITS[architecture], plain)
            if fault:
                wrong.append(f"{program.source} {' '.join(program.defines)} {kernel}: {fault}")
    assert not wrong, "\n".join(wrong)


def find_fault(used, code, launch, limits, plain=True):
    """Return what is wrong with a compiled kernel for a launch, or None."""
    if used["STACK"] or used["LOCAL"]:
        return f"spills {used['STACK'] + used['LOCAL']} bytes"
    if launch.shared > limits.shared:
        return f"takes {launch.shared} bytes of shared memory"
    resident = 1
    if launch.cluster:
        direction = {v: k for k, v in mvsplit_rmsnorm.CLUSTER_KERNELS.items()}[launch.kernel]
        wanted = mvsplit_rmsnorm.CLUSTER_OCCUPANCY[direction][1]
        by_memory = limits.shared_sm // (launch.shared + 1024)
        resident = min(wanted, by_memory) if plain else 1
    allocated = -(-used["REG"] // 8) * 8 * launch.block  # in units of 256 a warp
    if allocated * resident > REGISTERS:
        return f"{used['REG']} registers leave no room for {resident} blocks of {launch.block}"
    if launch.kernel not in SUM_KERNELS:
        if not re.search(r"\bLDG\.E(\.\w+)*\.128|\bUBLKCP", code):
            return "no 128-bit load"
        if not re.search(r"\bSTG\.E(\.\w+)*\.128", code) and launch.kernel != "sweep_reduce":
            return "no 128-bit store"
    return None


def test_subnormal_numbers_and_sums_in_double_survive_compilation():
    """The compiler gets no option of fast math: what is inexact is written in ptx.cuh.

    Only the division, for NaN, contains an FADD.FTZ of its own.
    """
    x, gain = torch.empty(1, 2000, 64, device="meta"), torch.empty(64, device="meta")
    with catalogue.record_launches("sm_90a") as recorder:
        for t in (x, x.bfloat16()):
            _cuda.swiglu_bwd(_cuda.swiglu_fwd(t, None, True), t, None, True)
            _cuda.residual_rmsnorm_bwd(t, t, t, gain, gain, torch.empty(1, 2000, device="meta"))
            _cuda.mvsplit_rmsnorm_fwd(t, t, gain, gain, None, None, (2000,), 1e-5, False)
    doubles = set()
    for program, launch in recorder.launches:
        code = disassemble(compile.nvrtc().compile(program, "sm_90a"))[launch.kernel]
        assert not re.search(r"\bF(MUL|FMA)(\.\w+)*\.FTZ", code), (program, launch.kernel)
        if "DADD" in code:
            doubles.add((launch.kernel, program.defines[0]))
    assert {("cluster_fwd", "DTYPE=float"), ("cluster_fwd", "DTYPE=bfloat16")} <= doubles
    assert ("sum_rows", "DTYPE=bfloat16") in doubles


def test_each_fault_is_detected():
    _, launch = catalogue.list_launches("sm_80")[0]
    used, limits = {"REG": 40, "STACK": 0, "LOCAL": 0}, LIMITS["sm_80"]
    code = "LDG.E.128.CONSTANT STG.E.128"
    assert find_fault(used, code, launch, limits) is None
    assert find_fault({**used, "STACK": 8}, code, launch, limits) == "spills 8 bytes"
    assert find_fault(used, "LDG.E.CONSTANT STG.E.128", launch, limits) == "no 128-bit load"
    assert find_fault(used, "LDG.E.128 STG.E.64", launch, limits) == "no 128-bit store"
    assert "leave no room" in find_fault({**used, "REG": 264}, code, launch, limits)
