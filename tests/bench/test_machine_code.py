"""Triton's kernels as compiled for GPUs that are not here, at the paper's shape."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from bench.static.machine_code import ARCHITECTURES, Kernel, widths
from mvsplit_ops import _backends

ROOT = pathlib.Path(__file__).parent.parent.parent

# In a process of its own: in this one Triton interprets. Every operator on every architecture, and
# every variant of the operators' tests for sm_90.
MEASURE = """
import json, sys, dataclasses
from bench.cases import Shape
from bench.static import machine_code
from tests.ops import (
    test_mvsplit_rmsnorm, test_qk_norm, test_residual_rmsnorm, test_rope, test_rope_qk_norm
)
kernels = machine_code.measure(Shape(), ["triton"])
modules = test_mvsplit_rmsnorm, test_qk_norm, test_residual_rmsnorm, test_rope, test_rope_qk_norm
variants = [
    case
    for module in modules
    for suite in vars(module).values() if hasattr(suite, "variants")
    for case in suite.variants.values()
]
kernels += machine_code.measure(Shape(), ["triton"], (90,), cases=variants)
print(json.dumps([dataclasses.asdict(k) for k in kernels]))
"""


def run_compiler(*command):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def kernels():
    records = json.loads(run_compiler(sys.executable, "-c", MEASURE))
    for record in records:
        for widths_of in ("loads", "stores"):
            record[widths_of] = {int(bits): n for bits, n in record[widths_of].items()}
    return [Kernel(**record) for record in records]


def test_every_operator_is_compiled_for_every_architecture(kernels):
    directions = {f"{op} {direction}" for op in _backends.OPS for direction in ("fwd", "bwd")}
    for architecture in ARCHITECTURES:
        found = {k.call for k in kernels if k.architecture == architecture}
        assert directions | {"mvsplit_rmsnorm_with_mean fwd"} <= found


def test_no_kernel_spills_or_takes_more_than_128_registers(kernels):
    for kernel in kernels:
        assert kernel.spilled == 0 and kernel.registers <= 128, kernel


def test_a_kernel_compiles_within_20_seconds(kernels):
    """Not a measurement but a bound on code size: the published backward takes 315 s, ours 1."""
    assert max(k.seconds for k in kernels) < 20


# They write means and sums, float32 of a few columns each, and no activation.
WRITE_NO_ACTIVATION = {"_means", "_bwd_means", "_sum_rows"}


def test_activations_move_in_16_byte_accesses(kernels):
    """bf16 in 128 bits; narrower are scalars of a row and float32 vectors, 32 bits or more."""
    for kernel in kernels:
        assert 128 in kernel.loads, kernel
        assert 128 in kernel.stores or kernel.name in WRITE_NO_ACTIVATION, kernel
        narrow_parameters = kernel.name in ("_means", "_bwd_apply")  # alpha and beta in bf16
        assert 16 not in kernel.stores, kernel
        assert 16 not in kernel.loads or narrow_parameters, kernel


TICKET = """
import re
from bench import compiled
from bench.cases import CASES, Shape
from mvsplit_ops import _backends
(case,) = (c for c in CASES if c.op == "mvsplit_rmsnorm_with_mean")
(_, args), *_ = compiled.launches_of(case, Shape())
with compiled.compiling(90) as kernels:
    _backends.kernel("triton", "mvsplit_rmsnorm", "_fwd", "cuda")(*args)
ptx = kernels[1][0].asm["ptx"]
print(*re.findall(r"st\\.global|bar\\.sync|atom\\.[\\w.:]+|ld\\.global\\.cg", ptx))
"""


def test_the_last_program_reads_what_the_others_have_stored():
    """Partial sums stored, a barrier, the ticket with acquire and release, a barrier, the reads."""
    steps = run_compiler(sys.executable, "-c", TICKET).split()
    (ticket,) = (i for i, step in enumerate(steps) if step.startswith("atom"))
    assert steps[ticket].startswith("atom.global.gpu.acq_rel.add")
    assert steps[ticket - 1] == steps[ticket + 1] == "bar.sync"
    assert "st.global" in steps[:ticket] and "ld.global.cg" in steps[ticket + 2 :]
    assert "ld.global.cg" not in steps[:ticket]


def test_widths_are_read_from_ptx():
    ptx = """
        ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        @%p1 ld.global.L1::evict_last.v2.b64 { %rd5, %rd6 }, [ %rd1 + 0 ];
        ld.global.cg.b32 { %r5 }, [ %rd2 + 0 ];
        ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 ];
        st.global.b16 [ %rd3 + 0 ], { %rs1 };
    """
    assert widths(ptx, "ld") == {128: 2, 32: 1} and widths(ptx, "st") == {16: 1}


def test_the_command_shows_the_kernels_of_both_backends():
    command = [sys.executable, "-m", "bench", "resources", "--op", "swiglu", "--arch", "90"]
    out = run_compiler(*command)
    assert all(name in out for name in ("swiglu bwd", "_bwd", "swiglu_bwd"))


def test_an_interpreting_process_says_so():
    command = [sys.executable, "-m", "bench", "resources", "--op", "swiglu", "--backend", "triton"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "unset TRITON_INTERPRET to compile" in done.stderr
