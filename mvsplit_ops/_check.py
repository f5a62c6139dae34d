"""Input checks shared by all operators, and their error messages.

An error is one sentence: the operator, the argument, what was expected, what was passed. Sizes may
be symbolic, as in torch.compile and torch.export: then a check becomes an assumption of the graph
(torch._check), so that one graph serves all sizes.
"""

import numbers
import operator
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from mvsplit_ops._host import (
    MOST_SEGMENTS,
    accumulator_dtype,
    describe,
    format_dtypes,
    format_shape,
)

# Activation dtypes by the names that command lines use.
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOATS = format_dtypes(*ACTIVATIONS, separator=", ")

Condition = bool | torch.SymBool


def fail(op: str, arg: str, expected: str, got: object) -> NoReturn:
    raise ValueError(_format_error(op, arg, expected, got))


def _format_error(op: str, arg: str, expected: str, got: object) -> str:
    return f"{op}: {arg} must be {expected}, got {got}"


def expect(
    condition: Condition, op: str, arg: str, details: Callable[[], tuple[str, object]]
) -> None:
    """Raise ValueError unless the condition holds; if it is symbolic, let the graph assume it.

    details: () -> (what was expected, what was passed), called only for the message
    """
    if isinstance(condition, torch.SymBool):
        torch._check_value(condition, lambda: _format_error(op, arg, *details()))
    elif not condition:
        fail(op, arg, *details())


def sizes_equal(sizes: Sequence[int], others: Sequence[int]) -> Condition:
    """Return whether two lists of sizes are equal, as a SymBool if that depends on symbols."""
    if len(sizes) != len(others):
        return False
    result: Condition = True
    for m, n in zip(sizes, others):  # noqa: B905 - of equal length
        if m is n:
            continue
        equal = m == n
        if equal is False:
            return False
        if equal is not True:
            result = equal if result is True else result & equal
    return result


def check_activation(
    op: str, arg: str, t: Tensor, dims: str, like: tuple[str, Tensor] | None = None
) -> None:
    """Check that t is a dense tensor with the dimensions that `dims` names, such as "B T H Dh".

    like: (name, tensor) whose dtype and device t must share.
    """
    rank = dims.count(" ") + 1
    if not isinstance(t, Tensor) or t.dim() != rank or t.dtype not in ACTIVATIONS:
        fail(op, arg, f"a tensor ({dims.replace(' ', ', ')}) of {FLOATS}", describe(t))
    check_dense(op, arg, t)
    if like is not None:
        if t.dtype != like[1].dtype:
            fail(op, arg, f"{format_dtypes(like[1].dtype)} like {like[0]}", describe(t))
        _check_device(op, arg, t, like[1])


def check_dense(op: str, arg: str, t: Tensor) -> None:
    if t.layout != torch.strided:
        fail(op, arg, "a dense tensor (call .to_dense())", f"layout {t.layout}")


def check_merge_inputs(op: str, x: Tensor, f: Tensor) -> None:
    """Check that x and f are (B, T, D) and have the same shape, dtype and device."""
    check_activation(op, "x", x, "B T D")
    check_width(op, "D, the last dimension of x,", x)
    check_activation(op, "f", f, "B T D", like=("x", x))
    check_same_shape(op, "f", f, "x", x)


def check_width(op: str, arg: str, t: Tensor) -> None:
    """Check that the last dimension of t, which `arg` names, is not empty."""
    filled = t.shape[-1] >= 1
    if filled is not True:
        expect(filled, op, arg, lambda: ("at least 1", t.shape[-1]))


def check_even_width(op: str, arg: str, t: Tensor) -> None:
    """Check that the last dimension of t, which `arg` names, has pairs of elements."""
    even = t.shape[-1] % 2 == 0
    if even is not True:
        expect(even, op, arg, lambda: ("even", t.shape[-1]))


def check_same_shape(op: str, arg: str, t: Tensor, name: str, other: Tensor) -> None:
    equal = sizes_equal(t.shape, other.shape)
    if equal is not True:
        expect(
            equal,
            op,
            arg,
            lambda: (
                f"of the shape of {name}, {format_shape(other.shape)}",
                format_shape(t.shape),
            ),
        )


def check_parameter(op: str, arg: str, t: Tensor | None, size: int, x: Tensor) -> None:
    """Check that t is None or a vector of `size` elements in float32 or the dtype of x."""
    if t is None:
        return
    right = (
        isinstance(t, Tensor)
        and t.dtype in (torch.float32, x.dtype)
        and sizes_equal(t.shape, (size,))
    )
    if right is not True:
        dtypes = format_dtypes(torch.float32, x.dtype)
        expect(right, op, arg, lambda: (f"{dtypes} ({size},)", describe(t)))
    _check_device(op, arg, t, x)


def check_statistic(op: str, arg: str, t: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    """Check that t is None or has this shape, in the dtype of the accumulators of x."""
    if t is None:
        return
    dtype = accumulator_dtype(x.dtype)
    right = isinstance(t, Tensor) and t.dtype == dtype and sizes_equal(t.shape, shape)
    if right is not True:
        expected = f"{format_dtypes(dtype)} "
        expect(right, op, arg, lambda: (expected + format_shape(shape), describe(t)))
    _check_device(op, arg, t, x)


def check_tables(op: str, cos: Tensor, sin: Tensor, x: Tensor) -> None:
    """Check that cos and sin are (T, Dh/2), (1, T, Dh/2) or (B, T, Dh/2), with T or more rows."""
    check_width(op, "Dh, the last dimension of x,", x)
    check_even_width(op, "Dh, the last dimension of x,", x)
    _check_table(op, "cos", cos, x)
    _check_table(op, "sin", sin, x)
    check_same_shape(op, "sin", sin, "cos", cos)
    if sin.dtype != cos.dtype:
        fail(op, "sin", f"{format_dtypes(cos.dtype)} like cos", describe(sin))


def _check_table(op: str, arg: str, t: Tensor, x: Tensor) -> None:
    B, T, _, Dh = x.shape
    right: Condition = isinstance(t, Tensor) and t.dtype in ACTIVATIONS and t.dim() in (2, 3)
    if right:
        batch, rows, width = t.shape if t.dim() == 3 else (1, *t.shape)
        right = width == Dh // 2
        if right is True and batch is not B and batch != 1:
            right = batch == B
    if right is not True:
        expect(right, op, arg, lambda: (_table_shapes(B, T, Dh), describe(t)))
    long = rows >= T
    if long is not True:
        expect(long, op, arg, lambda: (f"at least {T} rows long, one for each token", describe(t)))
    _check_device(op, arg, t, x)


def _table_shapes(B: int, T: int, Dh: int) -> str:
    half = Dh // 2
    shapes = f"({T}, {half}), (1, {T}, {half}) or ({B}, {T}, {half})"
    return f"{shapes}, or of width {Dh}, of {FLOATS}"


def to_token_counts(op: str, counts: object) -> list[int]:
    """Return `segments` as a list of ints; check_segments compares them with T.

    Accepts every integer type: of numpy, symbolic, and integer tensors with one element.
    """
    if type(counts) in (list, tuple) and all(type(n) is int for n in counts):  # type: ignore[attr-defined]
        return list(counts)  # type: ignore[call-overload]
    if isinstance(counts, (Tensor, str, bytes, dict)) or not hasattr(counts, "__iter__"):
        _fail_counts(op, counts)  # a tensor's values may be on a GPU: pass counts.tolist()
    return [_to_token_count(op, n, counts) for n in counts]


def _to_token_count(op: str, n: object, counts: object) -> int:
    if isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool):
        return n  # type: ignore[return-value]  # a SymInt stays symbolic
    if isinstance(n, Tensor):
        if n.dim() or _is_inexact(n):
            _fail_counts(op, counts)
        return n.item()  # type: ignore[return-value]
    # numpy.bool has no __index__ from numpy 2.3 on, but has before
    if not hasattr(n, "__index__") or type(n).__name__ in ("bool", "bool_"):
        _fail_counts(op, counts)
    return operator.index(n)


def _is_inexact(t: Tensor) -> bool:
    return t.dtype == torch.bool or t.is_floating_point() or t.is_complex()


def _fail_counts(op: str, counts: object) -> NoReturn:
    fail(op, "segments", "a sequence of token counts, e.g. (256, 64)", repr(counts))


def check_segments(op: str, counts: list[int], T: int) -> None:
    """Check that the token counts of the segments are positive and sum to T."""
    if not counts:
        fail(op, "segments", "token counts of at least 1", tuple(counts))
    if len(counts) > MOST_SEGMENTS:
        fail(op, "segments", f"at most {MOST_SEGMENTS} token counts", len(counts))
    for n in counts:
        positive = n >= 1
        if positive is not True:
            expect(positive, op, "segments", lambda: ("token counts of at least 1", tuple(counts)))
    equal = sum(counts) == T
    if equal is not True:
        expect(equal, op, "segments", lambda: (f"token counts that sum to T = {T}", tuple(counts)))


def to_eps(op: str, eps: object) -> float:
    """Return eps as a float; numpy's numbers are accepted too."""
    if type(eps) is float:
        return eps
    if isinstance(eps, torch.SymFloat):
        return eps  # type: ignore[return-value]
    if isinstance(eps, Tensor) and eps.dim() == 0 and not eps.is_complex():
        eps = eps.item()
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        fail(op, "eps", "a number", repr(eps))
    return float(eps)


def _check_device(op: str, arg: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        fail(op, arg, f"on {x.device}, the device of the first input", t.device)
