"""What the compiler makes of the Triton kernels, for a GPU that need not be here.

Each operator's launchers run on tensors without memory; each launch is compiled for an architecture
and its machine code read: registers, spilled bytes, the widths of loads and stores.
"""

import contextlib
import re
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.accuracy import results_and_gradients
from bench.cases import CASES
from bench.traffic import Recorder, op_and_direction
from mvsplit_ops import _backends

ARCHITECTURES = (80, 90, 100)
KNOWN_ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # those that Triton 3.5 compiles for


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for an architecture.

    call                the operator and its direction, e.g. "swiglu fwd"
    registers, spilled  of a thread; spilled and shared in bytes
    loads, stores       {bits of one access: how many are in the code}
    barriers            of the whole block, in the code
    """

    call: str
    name: str
    architecture: int
    warps: int
    registers: int
    spilled: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    barriers: int
    seconds: float


def measure(shape, architectures=ARCHITECTURES, progress=lambda what, of: None, cases=CASES):
    """Every kernel of every operator at a shape, on every architecture.

    RuntimeError: Triton is missing, or interprets its kernels in this process.
    """
    calls = [(case.op, *call) for case in cases for call in launches_of(case, shape)]
    kernels = {}
    for architecture in architectures:
        for case_op, kernel_op, args in calls:
            op, direction = op_and_direction(kernel_op)
            call = f"{case_op} {direction}"
            progress(f"{call}, sm_{architecture}", len(architectures) * len(calls))
            launch = _backends.kernel("triton", op, f"_{direction}", "cuda")
            with compiling(architecture) as compiled:
                launch(*args)
            for kernel, seconds in compiled:
                if kernel.hash not in kernels:
                    kernels[kernel.hash] = _read(call, architecture, kernel, seconds)
    return list(kernels.values())


def launches_of(case, shape):
    """(kernel op, its arguments) of one call of a case and its backward, on the meta device."""
    inputs = case.inputs(replace(shape, device="meta"), torch.Generator().manual_seed(0))
    with Recorder() as recorder:
        results_and_gradients(case.fused("triton"), *inputs)
    return [(kernel_op, args[:-1]) for kernel_op, args, _ in recorder.calls]


@contextlib.contextmanager
def compiling(architecture):
    """Within the block, Triton kernels are compiled and not launched: (compiled, seconds) each."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton interprets its kernels here; unset TRITON_INTERPRET to compile")

    class Absent:
        """The driver of a GPU that is not here."""

        def get_current_target(self):
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self):
            return architecture  # Triton keeps one cache of compiled kernels a device

        def get_current_stream(self, device):
            return 0

    run, compiled = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        compiled.append((kernel, time.perf_counter() - start))
        return kernel

    active, always = driver._active, triton.knobs.compilation.always_compile
    driver.set_active(Absent())
    JITFunction.run, triton.knobs.compilation.always_compile = compile_only, True
    try:
        yield compiled
    finally:
        driver.set_active(active)
        JITFunction.run, triton.knobs.compilation.always_compile = run, always


def _read(call, architecture, kernel, seconds):
    (usage,), ptx = resources(kernel.asm["cubin"]).values(), kernel.asm["ptx"]
    return Kernel(
        call=call,
        name=kernel.metadata.name,
        architecture=architecture,
        warps=kernel.metadata.num_warps,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
        loads=widths(ptx, "ld"),
        stores=widths(ptx, "st"),
        barriers=ptx.count("bar.sync"),
        seconds=seconds,
    )


def resources(cubin):
    """{kernel: {"REG": .., "STACK": .., "LOCAL": ..}} of a cubin."""
    text = _tool("cuobjdump", "--dump-resource-usage", cubin)
    found = re.findall(r"Function (\w+):\s*(.*)", text)
    return {
        name: {k: int(n) for k, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", line)}
        for name, line in found
    }


def sass(cubin):
    """{kernel: its machine code} of a cubin."""
    sections = re.split(r"\.section\s+\.text\.(\w+)", _tool("nvdisasm", "--print-code", cubin))
    return dict(zip(sections[1::2], sections[2::2], strict=True))


def _tool(name, option, cubin):
    """What a tool that comes with Triton prints of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), option, file.name], capture_output=True, check=True)
    return done.stdout.decode(errors="replace")


def widths(ptx, kind):
    """{bits: count} of the global accesses of a kind, "ld" or "st", in PTX."""
    found = re.findall(rf"\b{kind}\.global((?:\.[\w:]+)*)", ptx)
    return dict(Counter(map(_bits, found)))


def _bits(modifiers):
    vector = re.search(r"\.v(\d+)", modifiers)
    element = re.search(r"\.[bufs](\d+)", modifiers)
    return int(element[1]) * (int(vector[1]) if vector else 1)
