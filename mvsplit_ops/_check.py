"""Input checks shared by all operators, and their error messages.

An error is one sentence: the operator, the argument, what was expected, what was passed.
"""

from typing import NoReturn

import torch
from torch import Tensor

from mvsplit_ops._host import accumulator_dtype, describe, format_dtypes, format_shape

# Activation dtypes by the names that command lines use.
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op: str, arg: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: {arg} must be {expected}, got {got}")


def check_activation(
    op: str, arg: str, t: Tensor, dims: str, like: tuple[str, Tensor] | None = None
) -> None:
    """Check that t has the dimensions that `dims` names, such as "B T H Dh".

    like: (name, tensor) whose dtype and device t must share.
    """
    rank = len(dims.split())
    if not isinstance(t, Tensor) or t.dim() != rank or t.dtype not in ACTIVATIONS:
        floats = format_dtypes(*ACTIVATIONS, separator=", ")
        fail(op, arg, f"a tensor ({dims.replace(' ', ', ')}) of {floats}", describe(t))
    if like is not None:
        if t.dtype != like[1].dtype:
            fail(op, arg, f"{format_dtypes(like[1].dtype)} like {like[0]}", describe(t))
        _check_device(op, arg, t, like[1])


def check_merge_inputs(op: str, x: Tensor, f: Tensor) -> None:
    """Check that x and f are (B, T, D) and have the same shape, dtype and device."""
    check_activation(op, "x", x, "B T D")
    if x.shape[2] == 0:
        fail(op, "D, the last dimension of x,", "at least 1", 0)
    check_activation(op, "f", f, "B T D", like=("x", x))
    check_same_shape(op, "f", f, "x", x)


def check_same_shape(op: str, arg: str, t: Tensor, name: str, other: Tensor) -> None:
    if t.shape != other.shape:
        expected = f"of the shape of {name}, {format_shape(other.shape)}"
        fail(op, arg, expected, format_shape(t.shape))


def check_parameter(op: str, arg: str, t: Tensor | None, size: int, x: Tensor) -> None:
    """Check that t is None or a vector of `size` elements in float32 or the dtype of x."""
    if t is None:
        return
    if not _is_float(t, x) or tuple(t.shape) != (size,):
        fail(op, arg, f"{format_dtypes(torch.float32, x.dtype)} ({size},)", describe(t))
    _check_device(op, arg, t, x)


def check_statistic(op: str, arg: str, t: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    """Check that t is None or has this shape, in the dtype of the accumulators of x."""
    if t is None:
        return
    dtype = accumulator_dtype(x.dtype)
    if not isinstance(t, Tensor) or t.dtype != dtype or tuple(t.shape) != shape:
        fail(op, arg, f"{format_dtypes(dtype)} {format_shape(shape)}", describe(t))
    _check_device(op, arg, t, x)


def check_tables(op: str, cos: Tensor, sin: Tensor, x: Tensor) -> None:
    """Check that cos and sin are (T, Dh/2) or (B, T, Dh/2), with T or more rows."""
    B, T, _, Dh = x.shape
    if Dh % 2:
        fail(op, "Dh, the last dimension of x,", "even", Dh)
    for arg, t in (("cos", cos), ("sin", sin)):
        if (
            not _is_float(t, x)
            or t.dim() not in (2, 3)
            or t.shape[-1] != Dh // 2
            or (t.dim() == 3 and t.shape[0] != B)
        ):
            dtypes = format_dtypes(torch.float32, x.dtype)
            expected = f"{dtypes} ({T}, {Dh // 2}) or ({B}, {T}, {Dh // 2})"
            fail(op, arg, expected, describe(t))
        if t.shape[-2] < T:
            fail(op, arg, f"at least {T} rows long, one for each token", describe(t))
        _check_device(op, arg, t, x)
    check_same_shape(op, "sin", sin, "cos", cos)


def to_token_counts(op: str, counts: object) -> list[int]:
    """Return `segments` as a list of ints; check_segments compares them with T."""
    if not isinstance(counts, (list, tuple)) or any(
        isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) for n in counts
    ):
        fail(op, "segments", "a sequence of token counts, e.g. (256, 64)", repr(counts))
    return list(counts)


def check_segments(op: str, counts: list[int], T: int) -> None:
    """Check that the token counts of the segments are positive and sum to T."""
    if not counts or any(n <= 0 for n in counts):
        fail(op, "segments", "token counts of at least 1", tuple(counts))
    if sum(counts) != T:
        fail(op, "segments", f"token counts that sum to T = {T}", tuple(counts))


def _check_device(op: str, arg: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        fail(op, arg, f"on {x.device}, the device of the first input", t.device)


def _is_float(t: Tensor, x: Tensor) -> bool:
    return isinstance(t, Tensor) and t.dtype in (torch.float32, x.dtype)
