"""Choice of the backend that runs an operator, and the reasons why a backend cannot.

`reference` is eager PyTorch on any device. The other backends are modules that have `<op>_fwd` and
`<op>_bwd`, and may have `find_missing(device_type)`, which returns why they cannot run there. The
default depends only on the device type. A backend that cannot run raises an error; there is no
fallback.
"""

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch

OPS = ("rope", "qk_norm", "rope_qk_norm", "swiglu", "mvsplit_rmsnorm", "residual_rmsnorm")
BACKENDS = ("reference", "cpu", "triton", "cuda")

# Meta tensors run no kernel, so their backend does not matter. For CUDA tensors see FASTEST.
DEFAULTS = {"cpu": "cpu", "cuda": "triton", "meta": "cpu"}

# {(compute capability, op): (default backend of CUDA tensors, the file in bench/results that shows
# it to be the fastest)}. A row without a file has not been measured and has the backend of
# DEFAULTS, which every GPU without a row takes too.
UNMEASURED: tuple[str, str | None] = (DEFAULTS["cuda"], None)
FASTEST = {(capability, op): UNMEASURED for capability in ((8, 0), (9, 0), (10, 0)) for op in OPS}
MEASURED = any(file for _, file in FASTEST.values())  # if False, the GPU makes no difference


class _Source(NamedTuple):
    """Where the kernels of a backend come from."""

    module: str  # {op}: one module per operator
    device_types: tuple[str, ...]
    remedy: str  # if the module does not exist


_KERNELS = {
    "cpu": _Source(
        "mvsplit_ops._C",
        ("cpu",),
        "the C++ extension is not built; run pip install -e . --no-build-isolation",
    ),
    "triton": _Source(
        "mvsplit_ops.triton_kernels.{op}",
        ("cuda", "cpu"),
        "this version has no Triton kernel for it",
    ),
    "cuda": _Source(
        "mvsplit_ops._cuda",
        ("cuda", "cpu"),
        "this version has no CUDA C++ kernel for it",
    ),
}


class use_backend(contextlib.ContextDecorator):
    """Run operators that are called without `backend=` inside the block on backend `name`.

        with mv.use_backend("reference"):
            y = mv.swiglu(x)

    The choice holds for the current thread and asyncio task, and for tasks that are started in the
    block. Blocks may end in any order; the one entered last and not yet left decides. It may also
    decorate a function, and be used inside or outside of a function that torch.compile compiles
    (which sees the choice of its thread, not of an asyncio task).

    A backward runs on the backend of its forward, even after the block. But activation
    checkpointing calls the operators again, for tensors on a GPU in a thread of autograd: choose
    the backend inside of the checkpointed function, for example with

        checkpoint(mv.use_backend("cuda")(block), x, use_reentrant=False)

    ValueError: unknown backend.
    """

    def __init__(self, name: str) -> None:
        self.name = _check_name("use_backend", name)

    def _recreate_cm(self) -> "use_backend":  # for each call of a decorated function
        return use_backend(self.name)

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            self._outer = _compiling.name
            _compiling.name = self.name
        else:
            _set_entered((*_entered.get(), self))

    def __exit__(self, *error: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            _compiling.name = self._outer
            return
        entered = list(_entered.get())
        for i in reversed(range(len(entered))):
            if entered[i] is self:
                del entered[i]
                break
        _set_entered(tuple(entered))


# The blocks that this thread or asyncio task has entered, the last one last.
_entered: ContextVar[tuple[use_backend, ...]] = ContextVar("use_backend", default=())


class _Compiling(threading.local):
    """The choice of this thread for torch.compile, which guards on it but not on a ContextVar."""

    def __init__(self) -> None:
        self.name: str | None = None


_compiling = _Compiling()


def _set_entered(blocks: tuple[use_backend, ...]) -> None:
    _entered.set(blocks)
    _compiling.name = blocks[-1].name if blocks else None


def get_backend() -> str | None:
    """Return the name that use_backend chose for the current thread or asyncio task, or None."""
    if torch.compiler.is_dynamo_compiling():
        return _compiling.name
    blocks = _entered.get()
    return blocks[-1].name if blocks else None


def resolve(op: str, backend: str | None, x: torch.Tensor) -> str:
    """Return the backend of a call: the argument, else use_backend's, else the device's default."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{op}: the first argument must be a tensor, got {type(x).__name__}")
    backend = backend or get_backend() or (DEFAULTS["cpu"] if x.is_cpu else default(op, x.device))
    if backend is None:
        raise RuntimeError(
            f"{op}: no backend is the default on device type '{x.device.type}'; "
            "pass backend='reference'"
        )
    return _check_name(op, backend)


def default(op: str, device: torch.device) -> str | None:
    """Return the backend of a call that does not choose one; None if the device has no default."""
    if device.type == "cuda" and MEASURED:
        return FASTEST.get((torch.cuda.get_device_capability(device), op), UNMEASURED)[0]
    return DEFAULTS.get(device.type)


@functools.cache  # finding the kernel of a call is one dictionary lookup; errors are not cached
def load_kernel(backend: str, op: str, suffix: str, device_type: str) -> Callable[..., Any]:
    """Return the function `<op><suffix>` of a backend. RuntimeError: the backend cannot run."""
    if _check_name(op, backend) == "reference":
        raise RuntimeError(
            f"{op}: backend 'reference' has no kernel; "
            f"call mvsplit_ops.{op} or torch.ops.mvsplit.{op}"
        )
    reason = find_missing(backend, op, device_type)
    if reason:
        raise RuntimeError(
            f"{op}: backend '{backend}' cannot run here: {reason}; or pass backend='reference'"
        )
    return getattr(_load_module(backend, op), op + suffix)


@functools.cache
def find_missing(backend: str, op: str, device_type: str) -> str | None:
    """Return why a backend cannot run an operator on a device type, or None if it can."""
    if backend == "reference":
        return None
    source = _KERNELS[backend]
    if device_type not in source.device_types:
        return f"it takes tensors on {' or '.join(source.device_types)}, not {device_type}"
    try:
        module = _load_module(backend, op)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mvsplit_ops"):
            return source.remedy
        return f"{error.name} is not installed; run pip install 'mvsplit-ops[{backend}]'"
    except ImportError as error:
        return f"{error}; {source.remedy}"
    return module.find_missing(device_type) if hasattr(module, "find_missing") else None


def backends() -> dict[str, dict[str, str | None]]:
    """Return {backend: {op: None, or the reason why the backend cannot run it on this machine}}.

        mv.backends()["cuda"]["swiglu"]  # "torch finds no CUDA device; ..."

    For CUDA tensors where there is a GPU, else for CPU tensors (`cuda` always for CUDA tensors).
    """
    triton = "cuda" if torch.cuda.is_available() else "cpu"
    device = {"cpu": "cpu", "triton": triton, "cuda": "cuda", "reference": "cpu"}
    return {b: {op: find_missing(b, op, device[b]) for op in OPS} for b in BACKENDS}


def _load_module(backend: str, op: str) -> ModuleType:
    return importlib.import_module(_KERNELS[backend].module.format(op=op))


def _check_name(op: str, backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend
