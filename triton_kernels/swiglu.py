"""SwiGLU: y = silu(gate) * up, of gate and up packed in one row in either order, or of two tensors.

    s = sigmoid(gate)    dup = dy * (gate * s)    dgate = dy * up * s * (1 + gate * (1 - s))

The products are in the order of eager code, so that they overflow where eager code overflows.

Bytes, in N*F elements: forward 2 read and 1 written, backward 3 and 2, the minimum.
Launch: a flat grid over the N*F results, so that no width is padded to a power of two; a block may
hold the end of one row and the beginning of the next.
Preconditions: rows of contiguous elements, a constant stride apart, which may differ between the
tensors; the launchers copy others.
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
    x, up, layout = _find_halves(x, up, gate_first)
    y = new_empty(x, (*x.shape[:-1], layout["F"]))
    _launch(_fwd, y, (x, up, y), (x, up), layout)
    return y


def swiglu_bwd(dy: Tensor, x: Tensor, up: Tensor | None, gate_first: bool) -> tuple[Tensor, Tensor]:
    packed = up is None
    x, up, layout = _find_halves(x, up, gate_first)
    require("dy", dy, (*x.shape[:-1], layout["F"]), x.dtype)
    if not packed:
        require("up", up, x.shape, x.dtype)
    dy = to_strided_rows(dy)
    dx, dup = new_empty(x, x.shape), new_empty(x, 0 if packed else x.shape)
    _launch(_bwd, dy, (dy, x, up, dx, dx if packed else dup), (dy, x, up), layout)
    return dx, dup


def _find_halves(
    x: Tensor, up: Tensor | None, gate_first: bool
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Return the tensors that hold gate and up, and where these are in their rows."""
    width, x = x.shape[-1], to_strided_rows(x)
    if up is not None:
        return x, to_strided_rows(up), {"F": width, "GATE": 0, "UP": 0}
    F = width // 2
    return x, x, {"F": F, "GATE": 0 if gate_first else F, "UP": F if gate_first else 0}


def _launch(
    kernel: Any,
    like: Tensor,
    tensors: tuple[Tensor, ...],
    strided: tuple[Tensor, ...],
    layout: dict[str, int],
) -> None:
    total, F = like.numel(), layout["F"]
    vector = math.gcd(F, 16 // like.element_size()) if F else 1
    strides = tuple(row_stride(t) for t in strided)
    programs = ceil_div(total, TILE["BLOCK"])
    launch(kernel, programs, like, *tensors, strides, total, VECTOR=vector, **layout, **TILE)


@triton.jit(do_not_specialize=["total"])
def _fwd(
    gates,
    ups,
    y,
    strides,
    total,
    F: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, live = _places(total, F, VECTOR, BLOCK)
    gate = wide(tl.load(gates + row * strides[0] + GATE + column, live, other=0))
    up = wide(tl.load(ups + row * strides[1] + UP + column, live, other=0))
    result = gate * _sigmoid(gate, y.dtype.element_ty) * up
    tl.store(y + row * F + column, result.to(y.dtype.element_ty), live)


@triton.jit(do_not_specialize=["total"])
def _bwd(
    dy,
    gates,
    ups,
    dgates,
    dups,
    strides,
    total,
    F: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, live = _places(total, F, VECTOR, BLOCK)
    d = wide(tl.load(dy + row * strides[0] + column, live, other=0))
    gate = wide(tl.load(gates + row * strides[1] + GATE + column, live, other=0))
    up = wide(tl.load(ups + row * strides[2] + UP + column, live, other=0))
    s = _sigmoid(gate, dgates.dtype.element_ty)
    dgate = d * up * s * (1 + gate * (1 - s))
    dup = d * (gate * s)
    out = row * (F + GATE + UP) + column  # a packed row has 2F elements
    tl.store(dgates + out + GATE, dgate.to(dgates.dtype.element_ty), live)
    tl.store(dups + out + UP, dup.to(dups.dtype.element_ty), live)


@triton.jit
def _sigmoid(gate, stored: tl.constexpr):
    """Return 1 / (1 + exp(-gate)), accurate to the last bits of the dtype of the tensors.

    In float32, tl.exp errs by |gate| units in the last place, so exp(-gate) is computed as
    2^n * 2^(rest / ln 2) with 0 <= rest < ln 2. Beyond the clamp the result is 0 or 1.
    """
    if stored == tl.float32:
        x = tl.clamp(-gate, -105.0, 105.0)
        n = tl.floor(x * 1.4426950408889634)
        rest = tl.fma(n, -0.693145751953125, x)  # ln 2 in two parts: n times the first is exact
        rest = tl.fma(n, -1.428606765330187e-06, rest)
        return 1 / (1 + tl.exp2(n) * tl.exp2(rest * 1.4426950408889634))
    else:
        return tl.sigmoid(gate)


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
