"""What every operator demands of its inputs, and how it says so.

One sentence an error: the op, the argument, what was expected, what came.
"""

import torch

from mvsplit_ops._host import accumulator

# Activation dtypes by the names that command lines use.
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(t):
    """`bfloat16 (4, 320, 1024)` for a tensor, its repr for anything else."""
    if isinstance(t, torch.Tensor):
        return f"{_name(t.dtype)} {_shape(t.shape)}"
    return repr(t)


def fail(op, arg, expected, got):
    raise ValueError(f"{op}: {arg} must be {expected}, got {got}")


def activation(op, arg, t, dims, like=None):
    """t has the dimensions named in dims, e.g. "B T H Dh"; like: (name, t of its dtype, device)."""
    rank = len(dims.split())
    named = f"({dims.replace(' ', ', ')})"
    if not isinstance(t, torch.Tensor) or t.dim() != rank or t.dtype not in ACTIVATIONS:
        floats = ", ".join(_name(d) for d in ACTIVATIONS)
        fail(op, arg, f"a tensor {named} of {floats}", describe(t))
    if like is not None:
        if t.dtype != like[1].dtype:
            fail(op, arg, f"{_name(like[1].dtype)} like {like[0]}", describe(t))
        _same_device(op, arg, t, like[1])


def merge(op, x, f):
    """x and f are (B, T, D), alike."""
    activation(op, "x", x, "B T D")
    if x.shape[2] == 0:
        fail(op, "D, the last dimension of x,", "at least 1", 0)
    activation(op, "f", f, "B T D", like=("x", x))
    same_shape(op, "f", f, "x", x)


def same_shape(op, arg, t, name, other):
    if t.shape != other.shape:
        fail(op, arg, f"of the shape of {name}, {_shape(other.shape)}", _shape(t.shape))


def parameter(op, arg, t, size, x):
    """t is None or a vector of `size` in float32 or x's dtype."""
    if t is None:
        return
    if not _is_float(t, x) or tuple(t.shape) != (size,):
        fail(op, arg, f"{_either(x)} ({size},)", describe(t))
    _same_device(op, arg, t, x)


def statistic(op, arg, t, shape, x):
    """t is None or has the shape, in the dtype of x's accumulators."""
    if t is None:
        return
    acc = accumulator(x.dtype)
    if not isinstance(t, torch.Tensor) or t.dtype != acc or tuple(t.shape) != tuple(shape):
        fail(op, arg, f"{_name(acc)} {_shape(shape)}", describe(t))
    _same_device(op, arg, t, x)


def tables(op, cos, sin, x):
    """cos and sin are (T, Dh/2) or (B, T, Dh/2), T or more rows, in float32 or x's dtype."""
    B, T, _, Dh = x.shape
    if Dh % 2:
        fail(op, "Dh, the last dimension of x,", "even", Dh)
    for arg, t in (("cos", cos), ("sin", sin)):
        expected = f"{_either(x)} ({T}, {Dh // 2}) or ({B}, {T}, {Dh // 2})"
        if not _is_float(t, x) or t.dim() not in (2, 3) or t.shape[-1] != Dh // 2:
            fail(op, arg, expected, describe(t))
        if t.dim() == 3 and t.shape[0] != B:
            fail(op, arg, expected, describe(t))
        if t.shape[-2] < T:
            fail(op, arg, f"at least {T} rows long, one for each token", describe(t))
        _same_device(op, arg, t, x)
    same_shape(op, "sin", sin, "cos", cos)


def token_counts(op, counts):
    """segments as a list of ints; T itself is checked by `segments`."""
    if not isinstance(counts, (list, tuple)) or any(
        isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) for n in counts
    ):
        fail(op, "segments", "a sequence of token counts, e.g. (256, 64)", repr(counts))
    return list(counts)


def segments(op, counts, T):
    """counts are positive and sum to T."""
    if not counts or any(n <= 0 for n in counts):
        fail(op, "segments", "token counts of at least 1", tuple(counts))
    if sum(counts) != T:
        fail(op, "segments", f"token counts that sum to T = {T}", tuple(counts))


def _same_device(op, arg, t, x):
    if t.device != x.device:
        fail(op, arg, f"on {x.device}, where the first input is", t.device)


def _is_float(t, x):
    return isinstance(t, torch.Tensor) and t.dtype in (torch.float32, x.dtype)


def _either(x):
    dtypes = dict.fromkeys((torch.float32, x.dtype))
    return " or ".join(_name(d) for d in dtypes)


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _shape(shape):
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
