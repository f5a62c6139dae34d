"""A GPU that launches kernels: its limits, the loaded modules, and the launch itself.

It calls the CUDA driver through cuda-python, in the primary context, which PyTorch uses too. The
first launch of a kernel compiles and loads it, and must not happen while a CUDA graph is captured.
Every later launch is one call of the driver, on PyTorch's current stream, and waits for nothing.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvsplit_ops._cuda import compile
from mvsplit_ops._cuda.launch import Argument, Launch, Limits, Program, pack

OLDEST_BINDINGS = (12, 9)  # cuda-python
OLDEST_GPU = (8, 0)  # compute capability
DEFAULT_SHARED, PORTABLE_CLUSTER = 48 << 10, 8  # the most that a launch gets without asking
MOST_CONFIGURATIONS = 4096  # in the cache; each new shape of a batch may add some


def find_missing() -> str | None:
    """Return why no kernel can run on the GPUs of this machine, or None if one can."""
    version, needed = _find_bindings(), ".".join(map(str, OLDEST_BINDINGS))
    if version is None:
        return "cuda-python is not installed; run pip install 'mvsplit-ops[cuda]'"
    if tuple(map(int, version.split(".")[:2])) < OLDEST_BINDINGS:
        return (
            f"cuda-python must be {needed} or newer, got {version}; "
            "run pip install --upgrade 'mvsplit-ops[cuda]'"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build for CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; see torch.cuda.is_available()"
    best = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return None if best >= OLDEST_GPU else _describe_too_old(best)


def architecture(capability: tuple[int, int]) -> str:
    """Return the compilers' name of a compute capability: (8, 0) is sm_80, (9, 0) sm_90a."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@functools.cache
def get_gpu(index: int) -> "GPU":
    """Return the GPU that PyTorch numbers `index`."""
    return GPU(index)


_Address = ctypes.c_char_p * 1  # an array of one pointer: a kernel has one parameter


@dataclass
class _Kernel:
    name: str  # in errors
    function: Any
    static: int  # bytes of shared memory that it declares itself
    dynamic: int = 0  # bytes that a launch may have, if that was asked for


class GPU:
    """A Device (launch.py)."""

    def __init__(self, index: int) -> None:
        from cuda.bindings import driver

        self.index, self._driver, self._enqueue = index, driver, driver.cuLaunchKernelEx
        self._current = driver.cuCtxGetCurrent
        self._call("cuInit", 0)
        device = self._call("cuDeviceGet", index)
        self.limits = self._query_limits(device)
        self._context = self._call("cuDevicePrimaryCtxRetain", device)
        self._context_address = int(self._context)
        # The lock protects what follows: autograd runs backward on threads of its own.
        self._lock = threading.RLock()
        self._modules: dict[Program, Any] = {}
        self._kernels: dict[tuple[Program, str], _Kernel] = {}
        self._resident: dict[tuple, bool] = {}  # {program and launch of one cluster: it fits}
        # {(program, launch, stream): (configuration, function)}
        self._ready: dict[tuple[Program, Launch, int], tuple[Any, Any]] = {}

    def holds(self, program: Program, launch: Launch) -> bool:
        key = program, launch.kernel, launch.block, launch.cluster, launch.shared
        if key not in self._resident:
            self._resident[key] = self._fits(program, launch)
        return self._resident[key]

    def poison(self, t: Tensor) -> Tensor:
        return t

    def launch(self, program: Program, launch: Launch, args: Sequence[Argument]) -> None:
        if launch.grid == 0:
            return
        stream = torch.cuda.current_stream(self.index).cuda_stream
        ready = self._ready.get((program, launch, stream))
        if ready is None:
            ready = self._prepare(program, launch, stream)
        struct = _Address(pack(args))  # the address of the bytes, which it keeps alive
        arguments = (*ready, ctypes.addressof(struct), 0)
        if int(self._current()[1]) == self._context_address:
            (status,) = self._enqueue(*arguments)
        else:  # the context of another GPU, or none on a thread that has not called CUDA yet
            with self._in_context():
                (status,) = self._enqueue(*arguments)
        if status:
            self._check("cuLaunchKernelEx", status, f"{program.source}.cu, {launch}")

    # ---- once for each kernel, or shape of a launch ----

    def _prepare(self, program: Program, launch: Launch, stream: int) -> tuple[Any, Any]:
        with self._lock, self._in_context():
            kernel = self._load_kernel(program, launch.kernel)
            self._allow(kernel, launch)
            if len(self._ready) >= MOST_CONFIGURATIONS:
                self._ready.clear()
            ready = self._configure(launch, launch.grid, stream), kernel.function
            self._ready[program, launch, stream] = ready
        return ready

    def _fits(self, program: Program, launch: Launch) -> bool:
        if launch.cluster > self.limits.cluster or launch.shared > self.limits.shared:
            return False
        with self._lock, self._in_context():
            kernel = self._load_kernel(program, launch.kernel)
            if kernel.static + launch.shared > self.limits.shared:
                return False
            if launch.cluster == 0:
                return True
            self._allow(kernel, launch)
            one = self._configure(launch, launch.cluster, 0)
            status, clusters = self._driver.cuOccupancyMaxActiveClusters(kernel.function, one)
            if status == self._driver.CUresult.CUDA_ERROR_INVALID_CLUSTER_SIZE:
                return False
            self._check("cuOccupancyMaxActiveClusters", status, kernel.name)
            return clusters >= 1

    def _load_kernel(self, program: Program, name: str) -> _Kernel:
        key = program, name
        if key in self._kernels:
            return self._kernels[key]
        where = f"{program.source}.cu, {name}, {' '.join(program.defines)}"
        with torch.cuda.device(self.index):
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            raise RuntimeError(
                f"mvsplit_ops: {where}: a kernel cannot be loaded while a CUDA graph is captured; "
                "run the same forward and backward once before the capture"
            )
        if program not in self._modules:
            code = compile.load_or_compile(program, self.limits.architecture)
            self._modules[program] = self._call("cuModuleLoadData", code, where=where)
        module = self._modules[program]
        function = self._call("cuModuleGetFunction", module, name.encode(), where=where)
        # Asking for an attribute loads the kernel now: a lazy driver would wait for a launch.
        size = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        static = self._call("cuFuncGetAttribute", size, function, where=where)
        kernel = self._kernels[key] = _Kernel(where, function, static)
        return kernel

    def _allow(self, kernel: _Kernel, launch: Launch) -> None:
        """Ask for the shared memory and the cluster of a launch if the defaults are too small."""
        names = self._driver.CUfunction_attribute

        def set_attribute(name: Any, value: int) -> None:
            self._call("cuFuncSetAttribute", kernel.function, name, value, where=kernel.name)

        if kernel.static + launch.shared > DEFAULT_SHARED and launch.shared > kernel.dynamic:
            set_attribute(names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, launch.shared)
            kernel.dynamic = launch.shared  # never less, because an earlier launch needs it
        if launch.cluster:  # its blocks share an SM by their shared memory, so leave none to L1
            set_attribute(names.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
        if launch.cluster > PORTABLE_CLUSTER:
            set_attribute(names.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)

    def _configure(self, launch: Launch, grid: int, stream: int) -> Any:
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.block, 1, 1
        config.sharedMemBytes = launch.shared
        config.hStream = driver.CUstream(stream)
        if launch.cluster:
            value = driver.CUlaunchAttributeValue()
            value.clusterDim.x = launch.cluster
            value.clusterDim.y = value.clusterDim.z = 1
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value = value
            config.attrs, config.numAttrs = [attribute], 1
        return config

    # ---- the driver ----

    def _query_limits(self, device: Any) -> Limits:
        attributes = self._driver.CUdevice_attribute

        def query(name: str) -> int:
            attribute = getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}")
            return self._call("cuDeviceGetAttribute", attribute, device)

        capability = query("COMPUTE_CAPABILITY_MAJOR"), query("COMPUTE_CAPABILITY_MINOR")
        if capability < OLDEST_GPU:
            raise RuntimeError(
                f"mvsplit_ops: backend 'cuda' cannot run on cuda:{self.index}: "
                f"{_describe_too_old(capability)}; pass backend='reference'"
            )
        cluster = (16 if capability[0] in (9, 10) else 8) if query("CLUSTER_LAUNCH") else 0
        return Limits(
            architecture(capability),
            shared=query("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
            shared_sm=query("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"),
            cluster=cluster,
        )

    @contextlib.contextmanager
    def _in_context(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def _call(self, function: str, *args: Any, where: str = "") -> Any:
        """Call a driver function; return what it returns after its status."""
        status, *values = getattr(self._driver, function)(*args)
        self._check(function, status, where)
        return values[0] if values else None

    def _check(self, function: str, status: Any, where: str) -> None:
        if not status:
            return
        name, text = (
            describe(status)[1].decode()
            for describe in (self._driver.cuGetErrorName, self._driver.cuGetErrorString)
        )
        hint = ""
        if function == "cuModuleLoadData":
            version = self._driver.cuDriverGetVersion()[1]
            hint = (
                f"; the driver is for CUDA {version // 1000}.{version % 1000 // 10}, and the code "
                "of a newer compiler may need a newer driver"
            )
        where = f" ({where})" if where else ""
        raise RuntimeError(
            f"mvsplit_ops: {function} failed on cuda:{self.index}{where}: {name}: {text}{hint}"
        )


def _find_bindings() -> str | None:
    """Return the version of cuda-python, or None if it is not installed."""
    try:
        from cuda import bindings

        return bindings.__version__
    except ImportError:  # before 12.6 there were none
        try:
            return importlib.metadata.version("cuda-python")
        except importlib.metadata.PackageNotFoundError:
            return None


def _describe_too_old(capability: tuple[int, int]) -> str:
    needed, got = (".".join(map(str, c)) for c in (OLDEST_GPU, capability))
    return f"compute capability must be {needed} or newer, got {got}"
