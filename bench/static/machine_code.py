"""What the compilers make of the GPU kernels, for a GPU that need not be here.

Each operator's launchers run on tensors without memory; each launch is compiled for an architecture
and its machine code read: registers, spilled bytes, shared memory, the widths of loads and stores.
"""

import contextlib
import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cases import CASES
from bench.common.accuracy import results_and_gradients
from bench.static.occupancy import RESERVED, WARP, limits
from bench.static.traffic import Recorder, op_and_direction
from mvsplit_ops import _backends, _cuda
from mvsplit_ops._cuda import catalogue, compile

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for an architecture, and as a call launches it.

    call                the operator and its direction, e.g. "swiglu fwd"
    threads             of a block;  cluster  blocks of a cluster, 1 where there are none
    registers, spilled  of a thread; spilled and shared (of a block, static and dynamic) in bytes
    loads, stores       of global memory: {bits of one access: how many are in the code}; the code
                        is PTX with triton, machine code with cuda
    bulk                copies of any length from global to shared memory, in the code
    seconds             of the compiler; a program of several CUDA kernels has one time
    """

    call: str
    backend: str
    name: str
    architecture: int
    threads: int
    registers: int
    spilled: int
    shared: int
    cluster: int
    loads: dict[int, int]
    stores: dict[int, int]
    bulk: int
    seconds: float


def measure(
    shape,
    backends,
    architectures=ARCHITECTURES,
    progress=lambda what, of: None,
    cases=CASES,
):
    """Every kernel of every operator at a shape, on backends "triton" and "cuda".

    RuntimeError: a backend cannot be compiled here; see `missing`.
    """
    calls = [(case.op, *call) for case in cases for call in launches_of(case, shape)]
    steps = len(backends) * len(architectures) * len(calls)
    kernels, found = {}, {}
    for backend in backends:
        for architecture in architectures:
            for case_op, kernel_op, args in calls:
                op, direction = op_and_direction(kernel_op)
                call = f"{case_op} {direction}"
                progress(f"{call}, {backend}, sm_{architecture}", steps)
                compiled = BACKENDS[backend](call, architecture, op, direction, args)
                for key, kernel in compiled.items():
                    key = backend, architecture, key
                    first = kernels.setdefault(key, kernel)  # later ones come from Triton's cache
                    found.setdefault((call, *key), replace(first, call=call))
    return list(found.values())


def missing(backend, architectures=ARCHITECTURES):
    """Why a backend's kernels cannot be compiled here; None when they can."""
    if backend == "triton":
        return _backends.missing("triton", _backends.OPS[0], "cuda") or _interpreting()
    try:
        for tool in ("cuobjdump", "nvdisasm"):
            _path(tool)
        for architecture in architectures:
            compiler().require(limits(architecture).architecture)
    except RuntimeError as error:
        return str(error)
    return None


def launches_of(case, shape):
    """(kernel op, its arguments) of one call of a case and its backward, on the meta device."""
    inputs = case.example(replace(shape, device="meta"))
    with Recorder() as recorder:
        results_and_gradients(case.fused("triton"), *inputs)
    return [(kernel_op, args[:-1]) for kernel_op, args, _ in recorder.calls]


def compiler():
    """NVRTC, else nvcc. RuntimeError: neither is here."""
    try:
        return compile.nvrtc()
    except RuntimeError as error:
        if shutil.which("nvcc") is None:
            raise RuntimeError(f"{error}; or put nvcc on the PATH") from error
    return compile.nvcc()


def _compile_cuda(call, architecture, op, direction, args):
    """{launch: Kernel} of a kernel op."""
    with catalogue.recording(limits(architecture).architecture) as recorder:
        getattr(_cuda, f"{op}_{direction}")(*args)
    return {
        (program, replace(launch, grid=0)): _read_cuda(call, architecture, program, launch)
        for program, launch in recorder.launches
    }


def _read_cuda(call, architecture, program, launch):
    usage, code, seconds = _compiled(program, limits(architecture).architecture)
    usage, code = usage[launch.kernel], code[launch.kernel]
    return Kernel(
        call=call,
        backend="cuda",
        name=launch.kernel,
        architecture=architecture,
        threads=launch.block,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=static_shared(usage, architecture) + launch.shared,
        cluster=max(launch.cluster, 1),
        loads=sass_widths(code, "LD"),
        stores=sass_widths(code, "ST"),
        bulk=bulk_copies(code),
        seconds=seconds,
    )


@functools.cache
def _compiled(program, architecture):
    """(resources, machine code, seconds) of a Program: compiled now, whatever is kept on disk."""
    start = time.perf_counter()
    cubin = compiler().compile(program, architecture)
    seconds = time.perf_counter() - start
    return resources(cubin), sass(cubin), seconds


def _interpreting():
    import triton

    if triton.knobs.runtime.interpret:
        return "Triton interprets its kernels here; unset TRITON_INTERPRET to compile"
    return None


@contextlib.contextmanager
def compiling(architecture):
    """Within the block, Triton kernels are compiled and not launched: (compiled, seconds) each."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    reason = _interpreting()
    if reason:
        raise RuntimeError(reason)

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


def _compile_triton(call, architecture, op, direction, args):
    """{hash: Kernel} of a kernel op."""
    launch = _backends.kernel("triton", op, f"_{direction}", "cuda")
    with compiling(architecture) as compiled:
        launch(*args)
    found = {}
    for kernel, seconds in compiled:
        found.setdefault(kernel.hash, _read_triton(call, architecture, kernel, seconds))
    return found


def _read_triton(call, architecture, kernel, seconds):
    (usage,), ptx = resources(kernel.asm["cubin"]).values(), kernel.asm["ptx"]
    return Kernel(
        call=call,
        backend="triton",
        name=kernel.metadata.name,
        architecture=architecture,
        threads=kernel.metadata.num_warps * WARP,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=static_shared(usage, architecture) + kernel.metadata.shared,
        cluster=kernel.metadata.num_ctas,
        loads=widths(ptx, "ld"),
        stores=widths(ptx, "st"),
        bulk=bulk_copies(ptx),
        seconds=seconds,
    )


BACKENDS = {"triton": _compile_triton, "cuda": _compile_cuda}


@functools.cache  # several calls share a kernel
def resources(cubin):
    """{kernel: {"REG": .., "STACK": .., "SHARED": .., "LOCAL": ..}} of a cubin."""
    text = _tool("cuobjdump", "--dump-resource-usage", cubin)
    found = re.findall(r"Function (\w+):\s*(.*)", text)
    return {
        name: {k: int(n) for k, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        for name, line in found
    }


def static_shared(usage, architecture):
    """Bytes of shared memory that a kernel declares itself."""
    # From compute capability 9.0 on a cubin counts what CUDA reserves, if the kernel has any.
    return max(usage["SHARED"] - (RESERVED if architecture >= 90 else 0), 0)


def sass(cubin):
    """{kernel: its machine code} of a cubin."""
    sections = re.split(r"\.section\s+\.text\.(\w+)", _tool("nvdisasm", "--print-code", cubin))
    return dict(zip(sections[1::2], sections[2::2], strict=True))


def _tool(name, option, cubin):
    """What a tool of a CUDA toolkit prints of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_path(name), option, file.name], capture_output=True, check=True)
    return done.stdout.decode(errors="replace")


def _path(tool):
    """Where a tool that reads cubins is: it comes with Triton, and with a CUDA toolkit."""
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin" / tool if triton else None
    found = str(beside) if beside and beside.exists() else shutil.which(tool)
    if found is None:
        raise RuntimeError(
            f"{tool}, which reads machine code, is neither in Triton nor on the PATH; "
            "run pip install 'mvsplit-ops[triton]', or add the bin folder of a CUDA toolkit"
        )
    return found


def widths(ptx, kind):
    """{bits: count} of the global accesses of a kind, "ld" or "st", in PTX."""
    found = re.findall(rf"\b{kind}\.global((?:\.[\w:]+)*)", ptx)
    return dict(Counter(map(_bits, found)))


def _bits(modifiers):
    vector = re.search(r"\.v(\d+)", modifiers)
    element = re.search(r"\.[bufs](\d+)", modifiers)
    return int(element[1]) * (int(vector[1]) if vector else 1)


def sass_widths(code, kind):
    """{bits: count} of the global accesses of a kind, "LD" or "ST", in machine code."""
    names = {"LD": "LDG|LDGSTS", "ST": "STG"}[kind]
    found = re.findall(rf"\b(?:{names})\b((?:\.\w+)*)", code)
    bits = (re.findall(r"\.[US]?(\d+)\b", modifiers) or ["32"] for modifiers in found)
    return dict(Counter(int(numbers[-1]) for numbers in bits))


def bulk_copies(code):
    """Copies of any length from global to shared memory, in machine code or PTX."""
    return len(re.findall(r"\bUBLKCP\.S\.G|\bcp\.async\.bulk\.shared\S*\.global", code))
