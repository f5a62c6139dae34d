"""A GPU as kernels are launched on it: its limits, loaded modules, and the launch itself.

Through cuda-python's driver bindings, in the primary context, which is torch's. A kernel is
compiled and loaded by its first launch, which must not come while a CUDA graph is captured. From
then on a launch is one call of the driver, on torch's current stream, and waits for nothing.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import threading
from dataclasses import dataclass

import torch

from mvsplit_ops._cuda import compile
from mvsplit_ops._cuda.launch import Limits, pack

OLDEST_PYTHON, OLDEST_GPU = (12, 9), (8, 0)
DEFAULT_SHARED, PORTABLE_CLUSTER = 48 << 10, 8  # what a launch gets without asking for more
MOST_CONFIGURATIONS = 4096  # kept; each distinct shape of a batch may add some


def why_not():
    """Why no kernel can run on the GPUs of this machine; None when one can."""
    found, needed = _bindings_version(), ".".join(map(str, OLDEST_PYTHON))
    if found is None:
        return "cuda-python is not installed; run pip install 'mvsplit-ops[cuda]'"
    if tuple(map(int, found.split(".")[:2])) < OLDEST_PYTHON:
        return (
            f"cuda-python {needed} or newer is needed, found {found}; "
            "run pip install --upgrade 'mvsplit-ops[cuda]'"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build for CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; see torch.cuda.is_available()"
    best = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return None if best >= OLDEST_GPU else _too_old(best)


def architecture(capability):
    """What compilers call a compute capability: (8, 0) is sm_80, (9, 0) sm_90a."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@functools.cache
def gpu(index):
    """The GPU that torch numbers `index`."""
    return GPU(index)


_Address = ctypes.c_char_p * 1  # an array of one pointer: a kernel has one parameter


@dataclass
class _Kernel:
    name: str  # as errors say it
    function: object
    static: int  # bytes of shared memory that it declares itself
    dynamic: int = 0  # bytes that a launch may have, where that was asked for


class GPU:
    """A Device (device.py)."""

    def __init__(self, index):
        from cuda.bindings import driver

        self.index, self._driver, self._enqueue = index, driver, driver.cuLaunchKernelEx
        self._current = driver.cuCtxGetCurrent
        self._call("cuInit", 0)
        device = self._call("cuDeviceGet", index)
        self.limits = self._limits(device)
        self._context = self._call("cuDevicePrimaryCtxRetain", device)
        self._context_at = int(self._context)
        self._lock = threading.RLock()  # of what follows; a backward runs on a thread of its own
        self._modules, self._kernels = {}, {}
        self._resident = {}  # {(program, launch of one cluster): whether it fits}
        self._ready = {}  # {(program, launch, stream): (configuration, function)}

    def holds(self, program, launch):
        key = program, launch.kernel, launch.block, launch.cluster, launch.shared
        if key not in self._resident:
            self._resident[key] = self._fits(program, launch)
        return self._resident[key]

    def launch(self, program, launch, args):
        if launch.grid == 0:
            return
        stream = torch.cuda.current_stream(self.index).cuda_stream
        ready = self._ready.get((program, launch, stream))
        if ready is None:
            ready = self._prepare(program, launch, stream)
        struct = _Address(pack(args))  # of its bytes, which it keeps alive
        arguments = (*ready, ctypes.addressof(struct), 0)
        if int(self._current()[1]) == self._context_at:
            (status,) = self._enqueue(*arguments)
        else:  # another GPU's, or none: a thread that has not called CUDA yet
            with self._in_context():
                (status,) = self._enqueue(*arguments)
        if status:
            self._check("cuLaunchKernelEx", status, f"{program.source}.cu, {launch}")

    # ---- once for each kernel, or shape of a launch ----

    def _prepare(self, program, launch, stream):
        with self._lock, self._in_context():
            kernel = self._kernel(program, launch.kernel)
            self._allow(kernel, launch)
            if len(self._ready) >= MOST_CONFIGURATIONS:
                self._ready.clear()
            ready = self._configuration(launch, launch.grid, stream), kernel.function
            self._ready[program, launch, stream] = ready
        return ready

    def _fits(self, program, launch):
        if launch.cluster > self.limits.cluster or launch.shared > self.limits.shared:
            return False
        with self._lock, self._in_context():
            kernel = self._kernel(program, launch.kernel)
            if kernel.static + launch.shared > self.limits.shared:
                return False
            if launch.cluster == 0:
                return True
            self._allow(kernel, launch)
            one = self._configuration(launch, launch.cluster, 0)
            status, clusters = self._driver.cuOccupancyMaxActiveClusters(kernel.function, one)
            if status == self._driver.CUresult.CUDA_ERROR_INVALID_CLUSTER_SIZE:
                return False
            self._check("cuOccupancyMaxActiveClusters", status, kernel.name)
            return clusters >= 1

    def _kernel(self, program, name):
        """A kernel, loaded."""
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
            code = compile.binary(program, self.limits.architecture)
            self._modules[program] = self._call("cuModuleLoadData", code, where=where)
        module = self._modules[program]
        function = self._call("cuModuleGetFunction", module, name.encode(), where=where)
        # A question about the kernel: a driver that loads lazily would put it off to a launch.
        size = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        static = self._call("cuFuncGetAttribute", size, function, where=where)
        kernel = self._kernels[key] = _Kernel(where, function, static)
        return kernel

    def _allow(self, kernel, launch):
        """Let a kernel have the shared memory and the cluster of a launch, where it must ask."""
        names = self._driver.CUfunction_attribute
        if kernel.static + launch.shared > DEFAULT_SHARED and launch.shared > kernel.dynamic:
            name = names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call(
                "cuFuncSetAttribute", kernel.function, name, launch.shared, where=kernel.name
            )
            kernel.dynamic = launch.shared  # less would take back what an earlier launch needs
        if launch.cluster:  # its blocks share an SM by their shared memory: no L1 beside it
            name = names.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            self._call("cuFuncSetAttribute", kernel.function, name, 100, where=kernel.name)
        if launch.cluster > PORTABLE_CLUSTER:
            name = names.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            self._call("cuFuncSetAttribute", kernel.function, name, 1, where=kernel.name)

    def _configuration(self, launch, grid, stream):
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

    def _limits(self, device):
        attributes = self._driver.CUdevice_attribute

        def ask(name):
            attribute = getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}")
            return self._call("cuDeviceGetAttribute", attribute, device)

        capability = ask("COMPUTE_CAPABILITY_MAJOR"), ask("COMPUTE_CAPABILITY_MINOR")
        if capability < OLDEST_GPU:
            raise RuntimeError(
                f"mvsplit_ops: backend 'cuda' cannot run on cuda:{self.index}: "
                f"{_too_old(capability)}; pass backend='reference'"
            )
        cluster = (16 if capability[0] in (9, 10) else 8) if ask("CLUSTER_LAUNCH") else 0
        return Limits(
            architecture(capability),
            shared=ask("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
            shared_sm=ask("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"),
            cluster=cluster,
        )

    @contextlib.contextmanager
    def _in_context(self):
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def _call(self, function, *args, where=""):
        """What a driver function returns beside its status."""
        status, *values = getattr(self._driver, function)(*args)
        self._check(function, status, where)
        return values[0] if values else None

    def _check(self, function, status, where):
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
                f"; the driver is for CUDA {version // 1000}.{version % 1000 // 10}: what a newer "
                "compiler made may need a newer driver"
            )
        where = f" ({where})" if where else ""
        raise RuntimeError(
            f"mvsplit_ops: {function} failed on cuda:{self.index}{where}: {name}: {text}{hint}"
        )


def _bindings_version():
    try:
        from cuda import bindings

        return bindings.__version__
    except ImportError:  # before 12.6 there were none
        try:
            return importlib.metadata.version("cuda-python")
        except importlib.metadata.PackageNotFoundError:
            return None


def _too_old(capability):
    needed, found = (".".join(map(str, c)) for c in (OLDEST_GPU, capability))
    return f"compute capability {needed} or newer is needed, found {found}"
