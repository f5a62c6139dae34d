"""SwiGLU: y = silu(gate) * value, with x = [gate, value] packed in a row.

    s = sigmoid(gate)    dvalue = dy * gate * s    dgate = dy * value * s * (1 + gate * (1 - s))

Bytes, in N*F elements: forward 2 read and 1 written, backward 3 and 2, the minimum.
Launch: a flat grid over the N*F results, so that no width is padded to a power of two; a block may
hold the end of one row and the beginning of the next.
Preconditions: rows of contiguous elements, a constant stride apart; the launchers copy others.
Deterministic: no sums.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mvsplit_ops._host import ceil_div, new_empty, require, row_stride, to_strided_rows
from mvsplit_ops.triton_kernels._common import find_missing, launch, wide

__all__ = ["find_missing", "swiglu_bwd", "swiglu_fwd"]

# Results of a program, and its warps: 16 elements of each tensor per thread. In bf16 these are two
# 16-byte loads of each in flight, 64 bytes forward and 96 backward, with fewer than 64 registers.
TILE = {"BLOCK": 2048, "num_warps": 4}


def swiglu_fwd(x: Tensor, up: Tensor | None, gate_first: bool) -> Tensor:
    if up is not None or not gate_first:
        raise NotImplementedError("swiglu of two tensors")
    x = to_strided_rows(x)
    y = new_empty(x, (*x.shape[:-1], x.shape[-1] // 2))
    _launch(_fwd, x, y, x, y)
    return y


def swiglu_bwd(
    dy: Tensor, x: Tensor, up: Tensor | None, gate_first: bool
) -> tuple[Tensor, Tensor]:
    if up is not None or not gate_first:
        raise NotImplementedError("swiglu of two tensors")
    require("dy", dy, (*x.shape[:-1], x.shape[-1] // 2), x.dtype)
    x, dy, dx = to_strided_rows(x), to_strided_rows(dy), new_empty(x, x.shape)
    _launch(_bwd, x, dy, dy, x, dx)
    return dx, new_empty(x, 0)


def _launch(kernel: Any, x: Tensor, y: Tensor, *tensors: Tensor) -> None:
    total, F = y.numel(), y.shape[-1]
    vector = math.gcd(F, 16 // x.element_size()) if F else 1
    strides = row_stride(x), row_stride(y)
    programs = ceil_div(total, TILE["BLOCK"])
    launch(kernel, programs, x, *tensors, total, *strides, F=F, VECTOR=vector, **TILE)


@triton.jit(do_not_specialize=["total"])
def _fwd(
    x, y, total, x_stride, y_stride, F: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):
    row, column, live = _places(total, F, VECTOR, BLOCK)
    gate = wide(tl.load(x + row * x_stride + column, live, other=0))
    value = wide(tl.load(x + row * x_stride + F + column, live, other=0))
    result = gate * tl.sigmoid(gate) * value
    tl.store(y + row * y_stride + column, result.to(y.dtype.element_ty), live)


@triton.jit(do_not_specialize=["total"])
def _bwd(
    dy,
    x,
    dx,
    total,
    x_stride,
    dy_stride,
    F: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, live = _places(total, F, VECTOR, BLOCK)
    gate = wide(tl.load(x + row * x_stride + column, live, other=0))
    value = wide(tl.load(x + row * x_stride + F + column, live, other=0))
    d = wide(tl.load(dy + row * dy_stride + column, live, other=0))
    s = tl.sigmoid(gate)
    dgate = d * value * s * (1 + gate * (1 - s))
    dvalue = d * gate * s
    dx += row * (2 * F) + column
    tl.store(dx, dgate.to(dx.dtype.element_ty), live)
    tl.store(dx + F, dvalue.to(dx.dtype.element_ty), live)


@triton.jit
def _places(total, F: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Return row (int64), column and liveness of a program's results, as [vectors, VECTOR].

    A vector is inside one row, so one division serves all its elements, and Triton recognises them
    as contiguous, which it does not if each element is divided.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = start // F
    # 32 bits suffice within a block, where division by the constant F becomes a multiplication.
    first = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR
    place = (start - row * F).to(tl.int32) + first
    column = place % F // VECTOR * VECTOR + tl.arange(0, VECTOR)[None, :]
    return row + place // F, column, first < total - start
