"""Which backend runs an operator, and why another cannot.

`reference` is eager PyTorch on any device. The others are modules that offer `<op>_fwd` and
`<op>_bwd`, and may offer `missing(device_type)`: why they cannot run there. The default depends on
the device type alone; a backend that cannot run raises, nothing falls back.
"""

import contextlib
import functools
import importlib

import torch

OPS = ("rope", "qk_norm", "rope_qk_norm", "swiglu", "mvsplit_rmsnorm", "residual_rmsnorm")
BACKENDS = ("reference", "cpu", "triton", "cuda")

# On the meta device no kernel runs: any name stands for the registered shapes. CUDA tensors: see
# FASTEST.
DEFAULTS = {"cpu": "cpu", "cuda": "triton", "meta": "cpu"}

# What CUDA tensors take, by the compute capability of their GPU: (the fastest backend, the file in
# bench/results that shows it). A row without a file has not been measured and takes DEFAULTS, as
# does every GPU without a row.
UNMEASURED = (DEFAULTS["cuda"], None)
FASTEST = {(capability, op): UNMEASURED for capability in ((8, 0), (9, 0), (10, 0)) for op in OPS}
MEASURED = any(file for _, file in FASTEST.values())  # else nobody need be asked which GPU it is

# backend: (module that holds an op's kernels, device types it takes, what to do when it is missing)
_KERNELS = {
    "cpu": (
        "mvsplit_ops._C",
        ("cpu",),
        "the C++ extension is not built; run pip install -e . --no-build-isolation",
    ),
    "triton": (
        "mvsplit_ops.triton_kernels.{op}",
        ("cuda", "cpu"),
        "this version has no Triton kernel for it",
    ),
    "cuda": (
        "mvsplit_ops._cuda",
        ("cuda", "cpu"),
        "this version has no CUDA C++ kernel for it",
    ),
}

# use_backend's names, the innermost last: a plain list, which torch.compile can guard on.
_chosen = []


@contextlib.contextmanager
def use_backend(name):
    """Within the block, operators called without `backend=` run on backend `name`.

    A call's backward runs on the backend of its forward, also when it happens after the block. The
    choice holds for the whole process, as torch.backends' flags do.
    ValueError: no such backend.
    """
    _known("use_backend", name)
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


def resolve(op, backend, x):
    """The backend of one call: the argument, else use_backend's, else the default of x's device."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{op}: the first argument must be a tensor, got {type(x).__name__}")
    backend = backend or (_chosen[-1] if _chosen else default(op, x.device))
    if backend is None:
        raise RuntimeError(
            f"{op}: no backend is the default on device type '{x.device.type}'; "
            "pass backend='reference'"
        )
    return _known(op, backend)


def default(op, device):
    """The backend of a call without a choice: by the device alone; None where there is none."""
    if device.type == "cuda" and MEASURED:
        return FASTEST.get((torch.cuda.get_device_capability(device), op), UNMEASURED)[0]
    return DEFAULTS.get(device.type)


@functools.cache  # a call's way to its kernel is one dictionary look-up; an error is not cached
def kernel(backend, op, suffix, device_type):
    """The function that computes `<op><suffix>` on a backend; RuntimeError says what is missing."""
    if _known(op, backend) == "reference":
        raise RuntimeError(
            f"{op}: backend 'reference' is no kernel; "
            f"call mvsplit_ops.{op} or torch.ops.mvsplit.{op}"
        )
    reason = missing(backend, op, device_type)
    if reason:
        raise RuntimeError(
            f"{op}: backend '{backend}' cannot run here: {reason}; or pass backend='reference'"
        )
    return getattr(_load(backend, op), op + suffix)


@functools.cache
def missing(backend, op, device_type):
    """Why a backend cannot run an op on a device type; None when it can."""
    if backend == "reference":
        return None
    _, device_types, remedy = _KERNELS[backend]
    if device_type not in device_types:
        return f"it takes tensors on {' or '.join(device_types)}, not {device_type}"
    try:
        module = _load(backend, op)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mvsplit_ops"):
            return remedy
        return f"{error.name} is not installed; run pip install 'mvsplit-ops[{backend}]'"
    except ImportError as error:
        return f"{error}; {remedy}"
    return module.missing(device_type) if hasattr(module, "missing") else None


def backends():
    """{backend: {op: None, or the reason why the backend cannot run the op on this machine}}."""
    triton = "cuda" if torch.cuda.is_available() else "cpu"
    device = {"cpu": "cpu", "triton": triton, "cuda": "cuda", "reference": "cpu"}
    return {b: {op: missing(b, op, device[b]) for op in OPS} for b in BACKENDS}


def _load(backend, op):
    return importlib.import_module(_KERNELS[backend][0].format(op=op))


def _known(op, backend):
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend
