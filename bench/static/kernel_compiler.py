"""Compilation of the GPU kernels of every operator, for GPUs that need not be present.

The launchers of each operator run on tensors without memory; each launch is compiled for an
architecture and its machine code is read: registers, spilled bytes, shared memory, and the widths
of loads and stores.
"""

import contextlib
import functools
import shutil
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

from bench.cases import CASES, Case, Shape
from bench.common.accuracy import results_and_gradients
from bench.common.options import ReportProgress, no_progress
from bench.static import machine_code
from bench.static.machine_code import count_ptx_accesses, count_sass_accesses
from bench.static.occupancy import WARP, compute_occupancy, get_limits
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
    blocks_per_sm, limited_by, warps_share  of its Occupancy
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
    blocks_per_sm: int
    limited_by: str
    warps_share: float


@dataclass(frozen=True)
class Build:
    """A launch, its cubin, its code (PTX for triton, machine code for cuda), compiler seconds."""

    launch: Launch
    cubin: bytes
    code: str
    seconds: float


Builds = dict[Hashable, Build]


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
    builds: Builds = {}
    kernels: dict[Hashable, CompiledKernel] = {}
    for recorded, architecture, backend in product(calls, architectures, backends):
        case_op, kernel_op, args = recorded
        op, direction = split_kernel_op(kernel_op)
        call = f"{case_op} {direction}"
        progress(f"{call}, {backend}, sm_{architecture}", steps)
        for launch, build in COMPILERS[backend](architecture, op, direction, args).items():
            key = backend, architecture, launch
            first = builds.setdefault(key, build)  # Triton's cache has later ones
            kernels[call, key] = _read_kernel(call, backend, architecture, first)
    return list(kernels.values())


def _read_kernel(call: str, backend: str, architecture: int, build: Build) -> CompiledKernel:
    launch, code = build.launch, build.code
    resources = machine_code.read_resources(build.cubin)[launch.kernel]
    shared = machine_code.count_static_shared(resources, architecture) + launch.shared
    count_accesses = count_ptx_accesses if backend == "triton" else count_sass_accesses
    occupancy = compute_occupancy(architecture, resources["REG"], launch.block, shared)
    return CompiledKernel(
        call=call,
        backend=backend,
        name=launch.kernel,
        architecture=architecture,
        threads=launch.block,
        registers=resources["REG"],
        spilled=resources["STACK"] + resources["LOCAL"],
        shared=shared,
        cluster=max(launch.cluster, 1),
        loads=count_accesses(code, "ld"),
        stores=count_accesses(code, "st"),
        bulk=machine_code.count_bulk_copies(code),
        seconds=build.seconds,
        **asdict(occupancy),
    )


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


def _compile_cuda(architecture: int, op: str, direction: str, args: tuple) -> Builds:
    name = get_limits(architecture).architecture
    with catalogue.record_launches(name) as recorder:
        getattr(_cuda, f"{op}_{direction}")(*args)
    builds: Builds = {}
    for program, launch in recorder.launches:
        cubin, seconds = _compile_program(program, name)
        code = machine_code.disassemble(cubin)[launch.kernel]
        builds[program, replace(launch, grid=0)] = Build(launch, cubin, code, seconds)
    return builds


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

    absent_gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        get_current_device=lambda: architecture,  # Triton has one cache of kernels per device
        get_current_stream=lambda device: 0,
    )
    run = JITFunction.run
    compiled: list[tuple[Any, float]] = []

    def compile_kernel(self: Any, *args: Any, grid: Any, warmup: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        compiled.append((kernel, time.perf_counter() - start))
        return kernel

    active, always = driver._active, triton.knobs.compilation.always_compile
    driver.set_active(absent_gpu)
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


def _compile_triton(architecture: int, op: str, direction: str, args: tuple) -> Builds:
    with compile_only(architecture) as compiled:
        _backends.load_kernel("triton", op, f"_{direction}", "cuda")(*args)
    builds: Builds = {}
    for kernel, seconds in compiled:
        data, code = kernel.metadata, kernel.asm
        launch = Launch(data.name, 0, data.num_warps * WARP, data.num_ctas, data.shared)
        builds.setdefault(kernel.hash, Build(launch, code["cubin"], code["ptx"], seconds))
    return builds


# (architecture, op, direction, arguments) -> {key of a launch: its build}
COMPILERS = {"triton": _compile_triton, "cuda": _compile_cuda}
