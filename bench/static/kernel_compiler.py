"""Compilation of the GPU kernels of every operator, for GPUs that need not be present.

The launchers of each operator run on tensors without memory; each launch is compiled for an
architecture and its machine code is read: registers, spilled bytes, shared memory, and the widths
of loads and stores.
"""

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.cases import CASES, Case, Shape
from bench.common.accuracy import results_and_gradients
from bench.common.options import ReportProgress, no_progress
from bench.static import machine_code
from bench.static.occupancy import WARP, get_limits
from bench.static.traffic import Recorder, split_kernel_op
from mvsplit_ops import _backends, _cuda
from mvsplit_ops._cuda import catalogue, compile
from mvsplit_ops._cuda.launch import Launch, Program

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel compiled for an architecture, and as a call launches it.

    call                the operator and its direction, e.g. "swiglu fwd"
    threads             of a block;  cluster  blocks of a cluster, 1 without clusters
    registers, spilled  of a thread; spilled and shared (of a block, static and dynamic) in bytes
    loads, stores       of global memory: {bits of one access: number in the code}; the code is
                        PTX for triton, machine code for cuda
    bulk                copies of any length from global to shared memory, in the code
    seconds             of the compiler; a program with several CUDA kernels has one time
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


def compile_kernels(
    shape: Shape,
    backends: Sequence[str],
    architectures: Sequence[int] = ARCHITECTURES,
    progress: ReportProgress = no_progress,
    cases: Sequence[Case] = CASES,
) -> list[CompiledKernel]:
    """Compile every kernel of every operator at a shape, on backends "triton" and "cuda".

    RuntimeError: a backend cannot be compiled here; see `missing_reason`.
    """
    calls = [(case.op, *call) for case in cases for call in record_kernel_ops(case, shape)]
    steps = len(backends) * len(architectures) * len(calls)
    compiled: dict[Hashable, CompiledKernel] = {}
    kernels: dict[Hashable, CompiledKernel] = {}
    for backend in backends:
        for architecture in architectures:
            for case_op, kernel_op, args in calls:
                op, direction = split_kernel_op(kernel_op)
                call = f"{case_op} {direction}"
                progress(f"{call}, {backend}, sm_{architecture}", steps)
                launches = COMPILERS[backend](call, architecture, op, direction, args)
                for launch, kernel in launches.items():
                    key = backend, architecture, launch
                    first = compiled.setdefault(key, kernel)  # Triton's cache has later ones
                    kernels.setdefault((call, *key), replace(first, call=call))
    return list(kernels.values())


def missing_reason(backend: str, architectures: Sequence[int] = ARCHITECTURES) -> str | None:
    """Return why a backend's kernels cannot be compiled here, or None if they can."""
    if backend == "triton":
        return _backends.find_missing("triton", _backends.OPS[0], "cuda") or _interpreter_reason()
    try:
        for tool in machine_code.CUBIN_TOOLS:
            machine_code.find_tool(tool)
        for architecture in architectures:
            select_compiler().require(get_limits(architecture).architecture)
    except RuntimeError as error:
        return str(error)
    return None


def record_kernel_ops(case: Case, shape: Shape) -> list[tuple[Any, tuple]]:
    """Return (kernel op, arguments) of a call of a case and its backward, on the meta device."""
    inputs = case.example(replace(shape, device="meta"))
    with Recorder() as recorder:
        results_and_gradients(case.fused("triton"), *inputs)
    return [(kernel_op, args[:-1]) for kernel_op, args, _ in recorder.calls]


def select_compiler() -> compile.Compiler:
    """Return NVRTC, or nvcc without it. RuntimeError: neither is installed."""
    try:
        return compile.nvrtc()
    except RuntimeError as error:
        if shutil.which("nvcc") is None:
            raise RuntimeError(f"{error}; or put nvcc on the PATH") from error
    return compile.nvcc()


def _compile_cuda(
    call: str, architecture: int, op: str, direction: str, args: tuple
) -> dict[Hashable, CompiledKernel]:
    with catalogue.record_launches(get_limits(architecture).architecture) as recorder:
        getattr(_cuda, f"{op}_{direction}")(*args)
    return {
        (program, replace(launch, grid=0)): _read_cuda(call, architecture, program, launch)
        for program, launch in recorder.launches
    }


def _read_cuda(call: str, architecture: int, program: Program, launch: Launch) -> CompiledKernel:
    cubin, seconds = _compile_program(program, get_limits(architecture).architecture)
    resources = machine_code.read_resources(cubin)[launch.kernel]
    code = machine_code.disassemble(cubin)[launch.kernel]
    return CompiledKernel(
        call=call,
        backend="cuda",
        name=launch.kernel,
        architecture=architecture,
        threads=launch.block,
        registers=resources["REG"],
        spilled=machine_code.count_spilled(resources),
        shared=machine_code.count_static_shared(resources, architecture) + launch.shared,
        cluster=max(launch.cluster, 1),
        loads=machine_code.count_sass_accesses(code, "LD"),
        stores=machine_code.count_sass_accesses(code, "ST"),
        bulk=machine_code.count_bulk_copies(code),
        seconds=seconds,
    )


@functools.cache
def _compile_program(program: Program, architecture: str) -> tuple[bytes, float]:
    """Return the cubin of a program and the seconds of its compilation, ignoring the disk cache."""
    start = time.perf_counter()
    cubin = select_compiler().compile(program, architecture)
    return cubin, time.perf_counter() - start


@contextlib.contextmanager
def compile_only(architecture: int) -> Iterator[list[tuple[Any, float]]]:
    """Compile Triton kernels in the block instead of launching them.

    Yields a list that receives (compiled kernel, seconds) of each launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    reason = _interpreter_reason()
    if reason:
        raise RuntimeError(reason)

    class AbsentDriver:
        """The driver of a GPU that is not present."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return architecture  # Triton has one cache of compiled kernels per device

        def get_current_stream(self, device: int) -> int:
            return 0

    run = JITFunction.run
    compiled: list[tuple[Any, float]] = []

    def compile_kernel(self: Any, *args: Any, grid: Any, warmup: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        compiled.append((kernel, time.perf_counter() - start))
        return kernel

    active, always = driver._active, triton.knobs.compilation.always_compile
    driver.set_active(AbsentDriver())
    JITFunction.run, triton.knobs.compilation.always_compile = compile_kernel, True
    try:
        yield compiled
    finally:
        driver.set_active(active)
        JITFunction.run, triton.knobs.compilation.always_compile = run, always


def _interpreter_reason() -> str | None:
    import triton

    if triton.knobs.runtime.interpret:
        return "Triton interprets its kernels here; unset TRITON_INTERPRET to compile"
    return None


def _compile_triton(
    call: str, architecture: int, op: str, direction: str, args: tuple
) -> dict[Hashable, CompiledKernel]:
    launch = _backends.load_kernel("triton", op, f"_{direction}", "cuda")
    with compile_only(architecture) as compiled:
        launch(*args)
    kernels: dict[Hashable, CompiledKernel] = {}
    for kernel, seconds in compiled:
        kernels.setdefault(kernel.hash, _read_triton(call, architecture, kernel, seconds))
    return kernels


def _read_triton(call: str, architecture: int, kernel: Any, seconds: float) -> CompiledKernel:
    (resources,) = machine_code.read_resources(kernel.asm["cubin"]).values()
    ptx = kernel.asm["ptx"]
    return CompiledKernel(
        call=call,
        backend="triton",
        name=kernel.metadata.name,
        architecture=architecture,
        threads=kernel.metadata.num_warps * WARP,
        registers=resources["REG"],
        spilled=machine_code.count_spilled(resources),
        shared=machine_code.count_static_shared(resources, architecture) + kernel.metadata.shared,
        cluster=kernel.metadata.num_ctas,
        loads=machine_code.count_ptx_accesses(ptx, "ld"),
        stores=machine_code.count_ptx_accesses(ptx, "st"),
        bulk=machine_code.count_bulk_copies(ptx),
        seconds=seconds,
    )


# (call, architecture, op, direction, arguments) -> {launch: kernel}
COMPILERS: dict[str, Callable[[str, int, str, str, tuple], dict[Hashable, CompiledKernel]]] = {
    "triton": _compile_triton,
    "cuda": _compile_cuda,
}
