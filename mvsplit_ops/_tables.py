"""Rotary tables in the forms in which other libraries keep them, as cos and sin of half the width.

The kernels take cos and sin (T, Dh/2), (1, T, Dh/2) or (B, T, Dh/2) of any floating-point dtype and
any strides, so a conversion is a view, not a copy.
"""

import functools
import weakref

import torch
from torch import Tensor

from mvsplit_ops._check import fail
from mvsplit_ops._host import describe

# The layouts that fit each view of each full-width table that was checked, as (halves, pairs):
# {id of the tensor that owns the memory: (weak reference to it, its version, {view: answer})}.
Fits = tuple[bool, bool]
Answers = dict[tuple[object, ...], Fits]
_answers: dict[int, tuple[weakref.ref[Tensor], int, Answers]] = {}


def to_half_width(
    op: str, cos: Tensor, sin: Tensor | None, x: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of width Dh/2, as views, from any of the forms that `rope` accepts.

    Complex tables have cos as real and sin as imaginary part. A table of width Dh holds each angle
    twice: in two equal halves, or in pairs of equal neighbours.
    ValueError: sin is missing or superfluous, or the two entries of an angle differ.
    """
    if sin is None:
        if not isinstance(cos, Tensor) or not cos.is_complex():
            fail(op, "sin", "a tensor, or None if cos is complex", f"None with {describe(cos)}")
        cos, sin = cos.real, cos.imag
    if not (isinstance(x, Tensor) and isinstance(cos, Tensor) and isinstance(sin, Tensor)):
        return cos, sin  # the operator's check names the error
    if x.is_nested:
        return cos, sin
    if cos.is_complex():
        fail(op, "sin", "None if cos is complex", describe(sin))
    if cos.dim() and x.dim() and cos.shape[-1] == x.shape[-1] and cos.shape == sin.shape:
        return _halve(op, cos, sin, interleaved)
    return cos, sin


def _halve(op: str, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return the angles of full-width tables, each once.

    The layout is the one that fits both tables; if both layouts do, that of the mode.
    """
    if cos.shape[-1] % 2:
        return cos, sin  # the operator's check names the error
    expected = "of width Dh must repeat each angle, in two equal halves or in pairs"
    if _are_values_hidden(cos):  # the graph then checks the values, and selects
        for arg, t in (("cos", cos), ("sin", sin)):
            fits = [_all_equal(*parts) for parts in _layouts(t)]
            torch._assert_async(fits[0] | fits[1], f"{op}: {arg} {expected}")
        return _select(cos, sin, interleaved)
    try:
        cos_fits, sin_fits = _find_layouts(cos), _find_layouts(sin)
    except RuntimeError:  # a tracer, or vmap over tables
        return _select(cos, sin, interleaved)
    for i in (1, 0) if interleaved else (0, 1):
        if cos_fits[i] and sin_fits[i]:
            return _layouts(cos)[i][0], _layouts(sin)[i][0]
    arg = "sin" if any(cos_fits) else "cos"
    raise ValueError(f"{op}: {arg} {expected}; or pass width Dh/2 = {cos.shape[-1] // 2}")


def _layouts(t: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the two entries of each angle, in two halves and in pairs."""
    half = t.shape[-1] // 2
    return (t[..., :half], t[..., half:]), (t[..., ::2], t[..., 1::2])


def _all_equal(entries: Tensor, repeated: Tensor) -> Tensor:
    return (entries == repeated).all()


def _select(cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return the angles in the layout that fits both tables; NaN if neither does."""
    pairs = list(zip(_layouts(cos), _layouts(sin), strict=True))
    (first, second) = reversed(pairs) if interleaved else pairs
    fits, other_fits = (_all_equal(*c) & _all_equal(*s) for c, s in (first, second))
    cos, sin = (
        torch.where(fits, a[0], torch.where(other_fits, b[0], torch.nan))
        for a, b in zip(first, second, strict=True)
    )
    return cos, sin


def _are_values_hidden(t: Tensor) -> bool:
    """Return whether reading values would break a trace or the capture of a CUDA graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or t.is_meta:
        return True
    if t.is_cuda:
        return torch.cuda.is_current_stream_capturing()
    return type(t) not in (Tensor, torch.nn.Parameter)


def _find_layouts(t: Tensor) -> Fits:
    """Return whether halves and whether pairs fit a table; values that did not change are known."""
    if t.is_inference():  # changes of its values are not counted
        return _compare(t)
    owner = t._base if t._base is not None else t
    entry = _answers.get(id(owner))
    if entry is None or entry[0]() is not owner or entry[1] != owner._version:
        forget = functools.partial(_answers.pop, id(owner))  # takes the reference as default
        entry = _answers[id(owner)] = (weakref.ref(owner, forget), owner._version, {})
    view = (*t.shape, *t.stride(), t.storage_offset())
    if view not in entry[2]:
        entry[2][view] = _compare(t)
    return entry[2][view]


def _compare(t: Tensor) -> Fits:
    halves, pairs = (bool(_all_equal(*parts)) for parts in _layouts(t))
    return halves, pairs
