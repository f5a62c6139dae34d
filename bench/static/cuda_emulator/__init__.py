"""csrc/cuda on a CPU: the same .cu files compiled as C++, each thread of a GPU a fiber.

    cuda_emulator.install()      # CPU tensors now take backend "cuda"

Everything above a launch is what a GPU gets: mvsplit_ops._cuda's launchers, tables and packed
arguments. Global accesses are held to the tensors passed in, and their bytes counted; shared memory
and outputs begin as NaN; a barrier that some thread does not reach is an error that names it.
"""

import contextlib
import ctypes
import hashlib
import itertools
import math
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

from bench.static.byte_counter import Traffic
from mvsplit_ops import _backends
from mvsplit_ops._cuda import device
from mvsplit_ops._cuda.launch import LIMITS, Limits, pack

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
KERNELS = ROOT / "csrc" / "cuda"
COMPILE = ("g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-Wl,-Bsymbolic")

HOPPER, AMPERE = LIMITS["sm_90a"], LIMITS["sm_80"]


class Fault(RuntimeError):
    """A kernel did what a GPU would not forgive."""


@dataclass(eq=False)
class Emulator:
    """A Device (mvsplit_ops/_cuda/device.py) for CPU tensors."""

    limits: Limits = HOPPER
    traffic: Traffic = field(default_factory=Traffic)
    folder: Path = KERNELS  # of the .cu files

    def holds(self, program, launch):
        return True

    def poison(self, t):
        with _disable_current_modes():  # no operation of the launcher's
            return t.fill_(math.nan if t.is_floating_point() else -1)

    def launch(self, program, launch, args):
        if launch.grid == 0:
            return
        engine = _engine()
        library = _library(program, self.limits.architecture, self.folder)
        entry = getattr(library, launch.kernel)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if not engine.simt_begin():
            raise Fault("no terabyte of addresses to lay tensors apart; see ulimit -v")
        places = {}
        for t in tensors:
            places[id(t)] = engine.simt_place(t.data_ptr(), _span(t))
            _copy(places[id(t)], t.data_ptr(), t)
        packed = pack(args, lambda t: places[id(t)])
        self._check(library, program, launch, packed)
        counted = (ctypes.c_uint64 * 2)()
        fault = engine.simt_run(
            ctypes.cast(entry, ctypes.c_void_p),
            packed,
            launch.grid,
            launch.block,
            max(launch.cluster, 1),
            launch.shared,
            self.traffic.launches % 2,
            counted,
        )
        if fault:
            names = ", ".join(f"{i}: {tuple(t.shape)}" for i, t in enumerate(tensors))
            raise Fault(f"{program.source}.cu, {launch.kernel}: {fault.decode()} (tensors {names})")
        for slot, t in enumerate(tensors):
            if engine.simt_written(slot):
                _copy(t.data_ptr(), places[id(t)], t)
        self.traffic.read += counted[0]
        self.traffic.written += counted[1]
        self.traffic.launched(tensors)

    def _check(self, library, program, launch, packed):
        """What a GPU would refuse, or worse, not refuse."""
        expected = ctypes.c_uint.in_dll(library, f"{launch.kernel}_args_bytes").value
        most = ctypes.c_uint.in_dll(library, f"{launch.kernel}_most_threads").value
        where = f"{program.source}.cu, {launch.kernel}"
        if len(packed) != expected:
            raise Fault(f"{where}: Args has {expected} bytes, the launcher packed {len(packed)}")
        if launch.block > most:
            raise Fault(f"{where}: made for {most} threads, launched with {launch.block}")
        if launch.shared > self.limits.shared or launch.cluster > self.limits.cluster:
            raise Fault(f"{where}: {launch} is more than {self.limits}")
        if launch.grid % max(launch.cluster, 1):
            raise Fault(f"{where}: {launch.grid} blocks are no whole clusters")


def _span(t):
    """Bytes from the first element of a tensor to its last."""
    if t.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def _copy(to, start, t):
    """The elements of t, which lie at `start`, to the same places from `to` on."""
    if t.is_contiguous():
        ctypes.memmove(to, start, _span(t))
        return
    *outer, width = t.shape
    steps = [s * t.element_size() for s in t.stride()]
    for index in itertools.product(*map(range, outer)):
        at = sum(i * s for i, s in zip(index, steps, strict=False))
        ctypes.memmove(to + at, start + at, width * t.element_size())


def _build(name, *command, inputs):
    """A shared library made once for these inputs, also by many processes at once."""
    key = hashlib.sha256(repr((COMPILE, command)).encode())
    for path in inputs:
        key.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_emulator"
    target = folder / f"{name}-{key.hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "made.so"
            line = [*COMPILE, *command, "-o", str(made)]
            done = subprocess.run(line, capture_output=True, text=True)
            if done.returncode:
                raise Fault(f"{' '.join(line)}\n{done.stderr}")
            os.replace(made, target)
    return target


_loaded = {}


def _engine():
    if "engine" not in _loaded:
        sources = HERE / "engine.cpp", HERE / "engine.h"

        # A fiber's longjmp to another stack is what _FORTIFY_SOURCE would refuse.
        path = _build("engine", "-U_FORTIFY_SOURCE", str(sources[0]), inputs=sources)
        engine = _loaded["engine"] = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        engine.simt_place.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        engine.simt_place.restype = ctypes.c_uint64
        engine.simt_run.argtypes = [
            *(ctypes.c_void_p, ctypes.c_char_p),
            *(ctypes.c_uint32,) * 4,
            *(ctypes.c_int, ctypes.c_void_p),
        ]
        engine.simt_run.restype = ctypes.c_char_p
    return _loaded["engine"]


def _library(program, architecture, folder):
    key = program, architecture, folder
    if key not in _loaded:
        source = folder / f"{program.source}.cu"
        headers = [p for p in KERNELS.glob("*.cuh") if p.name != "ptx.cuh"]
        flags = [f"-D{d}" for d in program.defines]
        flags += [f"-D__CUDA_ARCH__={architecture.strip('sm_a')}0"]
        # <ptx.cuh> is ours, every other header the kernels' own.
        line = (*flags, "-I", str(HERE), "-I", str(KERNELS), "-x", "c++", str(source))
        inputs = (source, *sorted(headers), HERE / "ptx.cuh", HERE / "engine.h")
        _loaded[key] = ctypes.CDLL(str(_build(program.source, *line, inputs=inputs)))
    return _loaded[key]


def install(limits=HOPPER):
    """CPU tensors take backend "cuda" from now on; returns the Emulator."""
    emulator = device.installed["cpu"] = Emulator(limits)
    _forget()
    return emulator


def _forget():
    """What was found out about the backends before."""
    _backends.missing.cache_clear()
    _backends.kernel.cache_clear()


@contextlib.contextmanager
def absent():
    """Within the block, CPU tensors do not take backend "cuda", as where nothing is installed."""
    with using():
        device.installed.pop("cpu")
        _forget()
        yield


@contextlib.contextmanager
def using(limits=HOPPER):
    """Within the block, kernels on CPU tensors run on an Emulator of its own."""
    before = device.installed.get("cpu")
    try:
        yield install(limits)
    finally:
        device.installed.pop("cpu", None)
        if before is not None:
            device.installed["cpu"] = before
        _forget()


@contextlib.contextmanager
def counting(traffic):
    """Within the block CPU tensors take backend "cuda"; its bytes are added to `traffic`."""
    with using() as emulator:
        emulator.traffic = traffic
        yield traffic
