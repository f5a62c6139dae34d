"""Emulator of csrc/cuda on a CPU: the .cu files compiled as C++, with one fiber per GPU thread.

    cuda_emulator.install(cuda_emulator.Emulator())  # CPU tensors now take backend "cuda"

Everything above a launch is what a GPU gets: the launchers, tables and packed arguments of
mvsplit_ops._cuda. Global accesses are checked against the bounds of the tensors that were passed,
and their bytes are counted. Shared memory and outputs start as NaN. A barrier that some thread does
not reach raises an error that names the thread.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from ctypes import c_char_p, c_int, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bench.common.records import ROOT
from bench.static.byte_counter import ByteCounter
from mvsplit_ops import _backends
from mvsplit_ops._cuda import device
from mvsplit_ops._cuda.launch import LIMITS, Argument, Device, Launch, Limits, Program, pack

HERE = Path(__file__).parent
KERNELS = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_emulator"
COMPILER = ("g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-Wl,-Bsymbolic")

HOPPER, AMPERE = LIMITS["sm_90a"], LIMITS["sm_80"]


class Fault(RuntimeError):
    """A kernel or a launch did something that is an error, or undefined, on a GPU."""


@dataclass(eq=False)
class Emulator:
    """A Device (mvsplit_ops/_cuda/launch.py) for CPU tensors.

    folder  of the .cu files
    """

    limits: Limits = HOPPER
    counter: ByteCounter = field(default_factory=ByteCounter)
    folder: Path = KERNELS

    def holds(self, program: Program, launch: Launch) -> bool:
        return True

    def poison(self, t: Tensor) -> Tensor:
        with _disable_current_modes():  # a launcher's operations are counted, this one is not
            return t.fill_(math.nan if t.is_floating_point() else -1)

    def launch(self, program: Program, launch: Launch, args: Sequence[Argument]) -> None:
        if launch.grid == 0:
            return
        engine = _load_engine()
        library = _load_kernels(program, self.limits.architecture, self.folder)
        entry = getattr(library, launch.kernel)
        tensors = list({id(a): a for a in args if isinstance(a, torch.Tensor)}.values())
        if not engine.simt_begin():
            raise Fault("cannot reserve a terabyte of addresses to separate tensors; see ulimit -v")
        addresses = {}
        for t in tensors:
            addresses[id(t)] = engine.simt_place(t.data_ptr(), _span(t))
            _copy(addresses[id(t)], t.data_ptr(), t)
        packed = pack(args, lambda t: addresses[id(t)])
        self._check(library, program, launch, packed)
        counted = (c_uint64 * 2)()
        sizes = launch.grid, launch.block, max(launch.cluster, 1), launch.shared
        descending = self.counter.launches % 2  # the order of the threads alternates
        fault = engine.simt_run(ctypes.cast(entry, c_void_p), packed, *sizes, descending, counted)
        if fault:
            names = ", ".join(f"{i}: {tuple(t.shape)}" for i, t in enumerate(tensors))
            raise Fault(f"{program.source}.cu, {launch.kernel}: {fault.decode()} (tensors {names})")
        for slot, t in enumerate(tensors):
            if engine.simt_written(slot):
                _copy(t.data_ptr(), addresses[id(t)], t)
        self.counter.read += counted[0]
        self.counter.written += counted[1]
        self.counter.count_launch(tensors)

    def _check(self, library: ctypes.CDLL, program: Program, launch: Launch, packed: bytes) -> None:
        """Raise Fault for a launch that a GPU would refuse, or run with undefined results."""
        expected = c_uint32.in_dll(library, f"{launch.kernel}_args_bytes").value
        most = c_uint32.in_dll(library, f"{launch.kernel}_most_threads").value
        kernel = f"{program.source}.cu, {launch.kernel}"
        if len(packed) != expected:
            raise Fault(f"{kernel}: Args has {expected} bytes, the launcher packed {len(packed)}")
        if launch.block > most:
            raise Fault(f"{kernel}: takes at most {most} threads, launched with {launch.block}")
        if launch.shared > self.limits.shared or launch.cluster > self.limits.cluster:
            raise Fault(f"{kernel}: {launch} exceeds {self.limits}")
        if launch.grid % max(launch.cluster, 1):
            clusters = f"whole clusters of {launch.cluster}"
            raise Fault(f"{kernel}: {launch.grid} blocks are not {clusters}")


def _span(t: Tensor) -> int:
    """Return the bytes from the first element of a tensor to the end of its last."""
    if t.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def _copy(target: int, source: int, t: Tensor) -> None:
    """Copy the elements of t between two addresses of its first element, keeping its strides."""
    if t.is_contiguous():
        ctypes.memmove(target, source, _span(t))
        return
    *outer, width = t.shape if t.stride(-1) == 1 else (*t.shape, 1)
    steps = [s * t.element_size() for s in t.stride()]
    for index in itertools.product(*map(range, outer)):
        offset = sum(i * s for i, s in zip(index, steps, strict=False))
        ctypes.memmove(target + offset, source + offset, width * t.element_size())


def _build(name: str, arguments: Sequence[str], inputs: Sequence[Path]) -> Path:
    """Return a shared library, compiled once for these inputs by any number of processes."""
    key = hashlib.sha256(repr((COMPILER, arguments)).encode())
    for path in inputs:
        key.update(path.read_bytes())
    library = BUILD / f"{name}-{key.hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            output = Path(folder) / "library.so"
            command = [*COMPILER, *arguments, "-o", str(output)]
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode:
                raise Fault(f"{' '.join(command)}\n{process.stderr}")
            os.replace(output, library)
    return library


@functools.cache
def _load_engine() -> ctypes.CDLL:
    sources = HERE / "engine.cpp", HERE / "engine.h"
    # _FORTIFY_SOURCE would refuse a fiber's longjmp to another stack.
    path = _build("engine", ("-U_FORTIFY_SOURCE", str(sources[0])), sources)
    engine = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    engine.simt_place.argtypes, engine.simt_place.restype = [c_uint64, c_uint64], c_uint64
    engine.simt_run.argtypes = [c_void_p, c_char_p, *[c_uint32] * 4, c_int, c_void_p]
    engine.simt_run.restype = c_char_p
    return engine


@functools.cache
def _load_kernels(program: Program, architecture: str, folder: Path) -> ctypes.CDLL:
    source = folder / f"{program.source}.cu"
    headers = [p for p in KERNELS.glob("*.cuh") if p.name != "ptx.cuh"]
    defines = [f"-D{d}" for d in program.defines]
    defines += [f"-D__CUDA_ARCH__={architecture.strip('sm_a')}0"]
    # <ptx.cuh> is the one in this folder, every other header the kernels' own.
    arguments = (*defines, "-I", str(HERE), "-I", str(KERNELS), "-x", "c++", str(source))
    inputs = (source, *sorted(headers), HERE / "ptx.cuh", HERE / "engine.h")
    return ctypes.CDLL(str(_build(program.source, arguments, inputs)))


def install(emulator: Device | None) -> None:
    """Run backend "cuda" of CPU tensors on an emulator from now on; None: it cannot run."""
    if emulator is None:
        device.installed.pop("cpu", None)
    else:
        device.installed["cpu"] = emulator
    _backends.find_missing.cache_clear()
    _backends.load_kernel.cache_clear()


@contextlib.contextmanager
def using(emulator: Emulator | None) -> Iterator[Emulator | None]:
    """Install an emulator, or None, in the block, and restore the earlier one after it."""
    before = device.installed.get("cpu")
    install(emulator)
    try:
        yield emulator
    finally:
        install(before)


def count_bytes(counter: ByteCounter) -> contextlib.AbstractContextManager[Emulator | None]:
    """Emulate backend "cuda" of CPU tensors in the block; `counter` receives its bytes."""
    return using(Emulator(counter=counter))
