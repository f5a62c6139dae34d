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

# Whether the first layout of _layouts() fits, for each view of each table that was checked:
# {id of the tensor that owns the memory: (weak reference to it, {(): version, view: answer})}.
_answers: dict[int, tuple[weakref.ref[Tensor], dict[tuple[object, ...], int]]] = {}


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
        return _halve(op, "cos", cos, interleaved), _halve(op, "sin", sin, interleaved)
    return cos, sin


def _halve(op: str, arg: str, t: Tensor, interleaved: bool) -> Tensor:
    """Return the angles of a full-width table, each once.

    The layout of the mode, halves or interleaved pairs, is tried first.
    """
    if t.shape[-1] % 2:
        return t  # the operator's check names the error
    half = t.shape[-1] // 2
    layouts = [(t[..., :half], t[..., half:]), (t[..., ::2], t[..., 1::2])]
    first, second = reversed(layouts) if interleaved else layouts
    expected = f"{op}: {arg} of width Dh must repeat each angle, in two equal halves or in pairs"
    if _are_values_hidden(t):  # the graph then checks the values, and selects
        torch._assert_async(_all_equal(first) | _all_equal(second), expected)
        return _select(first, second)
    answers = _answers_about(t)
    view = (*t.shape, *t.stride(), t.storage_offset(), interleaved)
    if view not in answers:
        try:
            fits, other_fits = bool(_all_equal(first)), bool(_all_equal(second))
        except RuntimeError:  # a tracer, or vmap over tables
            return _select(first, second)
        if not (fits or other_fits):
            raise ValueError(f"{expected}; or pass width Dh/2 = {half}")
        answers[view] = fits
    return first[0] if answers[view] else second[0]


def _select(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Return the angles in the layout that fits; NaN if neither does."""
    other = torch.where(_all_equal(second), second[0], torch.nan)
    return torch.where(_all_equal(first), first[0], other)


def _all_equal(pair: tuple[Tensor, Tensor]) -> Tensor:
    return (pair[0] == pair[1]).all()


def _are_values_hidden(t: Tensor) -> bool:
    """Return whether reading values would break a trace or the capture of a CUDA graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or t.is_meta:
        return True
    if t.is_cuda:
        return torch.cuda.is_current_stream_capturing()
    return type(t) not in (Tensor, torch.nn.Parameter)


def _answers_about(t: Tensor) -> dict[tuple[object, ...], int]:
    """Return the answers about the present values of a table, empty if they are new."""
    if t.is_inference():  # changes of its values are not counted
        return {}
    owner = t._base if t._base is not None else t
    entry = _answers.get(id(owner))
    if entry is None or entry[0]() is not owner or entry[1].get(()) != owner._version:
        forget = functools.partial(_answers.pop, id(owner))  # takes the reference as default
        entry = _answers[id(owner)] = (weakref.ref(owner, forget), {(): owner._version})
    return entry[1]
