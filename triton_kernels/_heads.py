"""The kernel pair of rope, qk_norm and rope_qk_norm: RMSNorm over a head, rotation of its pairs.

R rotates the pair (x1, x2): o1 = x1 cos - x2 sin, o2 = x2 cos + x1 sin; cos^2 + sin^2 may differ
from 1.

    rotation first   u = R x     n = u * rstd(u)            y = n * w
    norm first       n = x * rstd(x)                        y = R (n * w)

Backward, with R^T the transposed rotation and g the gradient of n * w:

    rotation first   g = dy      du = norm'(g * w, n)       dx = R^T du
    norm first       g = R^T dy                             dx = norm'(g * w, n)
    dw = sum g * n   norm'(g, n) = rstd * (g - n * mean(g * n))

If the rotation is first and there is no weight, n is the result y; else it is computed again from
the input.

Bytes, in passes over q or k: forward 1 read and 1 written of each, backward 2 and 1, and a row of
the tables once per token for all heads of q and k. Launch: a program owns whole tokens of q and k
with all heads; a tile is [tokens, heads, pairs]. A thread has 8 adjacent elements, 16 bytes of
bf16, and their 8 partners. With a weight, a second launch adds partial rows of dw.

Preconditions: contiguous heads; the launchers copy other tensors. The tables have any strides and
any dtype. Deterministic: the order of every sum depends only on the shape.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mvsplit_ops._host import (
    MOST_PARTIALS,
    HeadLaunchers,
    HeadModes,
    Tables,
    ceil_div,
    new_empty,
    new_statistics,
    next_power_of_two,
    require_heads,
    table_strides,
    to_contiguous,
    to_unit_stride,
)
from mvsplit_ops.triton_kernels._common import launch, sum_rows, wide

# Pairs of a tile, and its warps: 8 pairs per thread, in bf16 two 16-byte loads in flight forward
# and four backward. Twice the tile took 90 registers instead of 54 and more exchanges of angles.
TILE_PAIRS, TILE_WARPS = 1024, 4
# Most tiles that a program adds to dw one after another. sum_rows adds the sums of the programs.
MOST_TILES = 32
# Heads of a tile; more are processed one tile after another, with the same angles.
MOST_HEADS = 8


def _forward(
    xs: list[Tensor],
    weights: list[Tensor | None],
    tables: Tables,
    eps: float,
    modes: HeadModes,
    norm: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the results and rstds of x, or of q and k; no rstd without a norm."""
    xs, weights = [to_unit_stride(x) for x in xs], to_contiguous(*weights)
    ys = [new_empty(x, x.shape) for x in xs]
    rstds = [new_statistics(x, *x.shape[:3]) for x in xs] if norm else []
    angle_strides = table_strides(tables, xs[0])
    strides = tuple(x.stride()[:3] for x in xs)
    tokens, options = _choose_options(xs, modes)
    launch(
        _fwd,
        ceil_div(tokens, options["TILE"].tokens),
        xs[0],
        *(tuple(xs), tuple(weights), tables, tuple(ys), tuple(rstds), strides, angle_strides),
        *(xs[0].shape[1], tokens),
        EPS=eps,
        **options,
    )
    return ys, rstds


def _backward(
    dys: list[Tensor],
    saved: list[Tensor],
    rstds: list[Tensor],
    weights: list[Tensor | None],
    tables: Tables,
    modes: HeadModes,
) -> tuple[Tensor, ...]:
    """Return dq, dk, dq_weight, dk_weight; the last two are empty without a weight."""
    require_heads(dys, saved, rstds, weights)
    dys, saved = [to_unit_stride(t) for t in dys], [to_unit_stride(t) for t in saved]
    rstds, weights = to_contiguous(*rstds), to_contiguous(*weights)
    dxs = [new_empty(x, x.shape) for x in saved]
    angle_strides = table_strides(tables, saved[0])
    strides = tuple((*dy.stride()[:3], *x.stride()[:3]) for dy, x in zip(dys, saved, strict=True))
    tokens, options = _choose_options(saved, modes)
    tile, weighted = options["TILE"], sum(w is not None for w in weights)
    per_program = tile.tokens
    if weighted:
        tiles = ceil_div(ceil_div(tokens, MOST_PARTIALS), tile.tokens)
        most = MOST_TILES // max(1, ceil_div(max(options["HEADS"]), tile.heads))
        per_program *= max(1, min(tiles, most))
    programs = ceil_div(tokens, per_program)
    partials = new_statistics(saved[0], weighted, programs, saved[0].shape[3])
    launch(
        _bwd,
        programs,
        saved[0],
        *(tuple(dys), tuple(saved), tuple(rstds), tuple(weights), tables, tuple(dxs), partials),
        *(strides, angle_strides, saved[0].shape[1], tokens, per_program),
        **options,
    )
    sums = iter(sum_rows(partials) if weighted else ())
    none = [new_statistics(saved[0], 0) for _ in weights]
    return *dxs, *(n if w is None else next(sums) for w, n in zip(weights, none, strict=True))


LAUNCHERS = HeadLaunchers(_forward, _backward)


class HeadTile(NamedTuple):
    """Sizes of the tile that a program works on at once."""

    tokens: int
    heads: int
    pairs: int


def _choose_options(xs: list[Tensor], modes: HeadModes) -> tuple[int, dict[str, Any]]:
    """Return the number of tokens, and the constants of a kernel."""
    B, T, _, D = xs[0].shape
    pairs = next_power_of_two(ceil_div(D, 2))
    counts = tuple(x.shape[2] for x in xs)
    most = max(MOST_HEADS, next_power_of_two(ceil_div(max(counts), MOST_TILES)))
    heads = min(next_power_of_two(max(counts)), most)
    tile = HeadTile(max(1, TILE_PAIRS // (heads * pairs)), heads, pairs)
    options = {"HEADS": counts, "D": D, "TILE": tile, "MODES": modes, "num_warps": TILE_WARPS}
    return B * T if D else 0, options


@triton.jit(do_not_specialize=["T", "tokens"])
def _fwd(
    xs,
    weights,
    tables,
    ys,
    rstds,
    strides,
    angle_strides,
    T,
    tokens,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    MODES: tl.constexpr,
    EPS: tl.constexpr,
):
    ROTATE: tl.constexpr = len(tables) > 0
    n = tl.program_id(0).to(tokens.dtype) * TILE.tokens + tl.arange(0, TILE.tokens)[:, None, None]
    if ROTATE:
        cos, sin = _angles(xs[0], tables, angle_strides, n, T, tokens, D, TILE.pairs)
        sin = -sin if MODES.conjugate else sin
    for i in tl.static_range(len(HEADS)):
        for first in tl.range(0, HEADS[i], TILE.heads):
            h = first + tl.arange(0, TILE.heads)[None, :, None]
            live = (n < tokens) & (h < HEADS[i])
            row = _row(n, h, T, strides[i][0], strides[i][1], strides[i][2])
            x1, x2 = _load_pairs(xs[i] + row, live, D, TILE.pairs, MODES.interleaved)
            if ROTATE and not MODES.norm_first:
                x1, x2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
            out = n.to(tl.int64) * HEADS[i] + h
            if len(rstds) > 0:
                rstd = tl.rsqrt(_mean(x1 * x1 + x2 * x2, D) + EPS)
                x1, x2 = x1 * rstd, x2 * rstd
                tl.store(rstds[i] + out, rstd, live)
            if weights[i] is not None:
                w1, w2 = _load_pairs(weights[i], True, D, TILE.pairs, MODES.interleaved)
                x1, x2 = x1 * w1, x2 * w2
            if ROTATE and MODES.norm_first:
                x1, x2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
            _store_pairs(ys[i] + out * D, x1, x2, live, D, TILE.pairs, MODES.interleaved)


@triton.jit(do_not_specialize=["T", "tokens", "per_program"])
def _bwd(
    dys,
    saved,
    rstds,
    weights,
    tables,
    dxs,
    partials,
    strides,
    angle_strides,
    T,
    tokens,
    per_program,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    MODES: tl.constexpr,
):
    pid = tl.program_id(0)
    steps = per_program // TILE.tokens
    begin = pid.to(tokens.dtype) * per_program
    zero = tl.zeros(TILE, rstds[0].dtype.element_ty)
    # With a weight, q and k in turn: two sums of dw would not fit the registers.
    TOGETHER: tl.constexpr = 2 if weights[0] is None and weights[1] is None else 1
    for part in tl.static_range(0, 2, TOGETHER):
        dw1, dw2 = zero, zero
        for step in range(steps):
            n = begin + step + steps * tl.arange(0, TILE.tokens)[:, None, None]
            angles = ()
            if len(tables) > 0:
                cos, sin = _angles(saved[0], tables, angle_strides, n, T, tokens, D, TILE.pairs)
                angles = cos, -sin if MODES.conjugate else sin
            for i in tl.static_range(part, part + TOGETHER):
                dw1, dw2 = _bwd_heads(
                    dys[i],
                    saved[i],
                    rstds[i],
                    weights[i],
                    dxs[i],
                    strides[i],
                    n,
                    T,
                    tokens,
                    angles,
                    dw1,
                    dw2,
                    HEADS[i],
                    D,
                    TILE,
                    MODES,
                )
        if weights[part] is not None:
            _store_sum(partials + pid.to(tl.int64) * D, dw1, dw2, D, TILE.pairs, MODES.interleaved)
            partials += tl.num_programs(0).to(tl.int64) * D


@triton.jit
def _bwd_heads(
    dys,
    saved,
    rstds,
    weight,
    dxs,
    strides,
    n,
    T,
    tokens,
    angles,
    dw1,
    dw2,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    MODES: tl.constexpr,
):
    """Store dx of all heads of the tokens n; return dw with their part added."""
    ROTATE: tl.constexpr = len(angles) > 0
    if ROTATE:
        cos, sin = angles
    for first in tl.range(0, HEADS, TILE.heads):
        h = first + tl.arange(0, TILE.heads)[None, :, None]
        live = (n < tokens) & (h < HEADS)
        row = _row(n, h, T, strides[0], strides[1], strides[2])
        g1, g2 = _load_pairs(dys + row, live, D, TILE.pairs, MODES.interleaved)
        row = _row(n, h, T, strides[3], strides[4], strides[5])
        n1, n2 = _load_pairs(saved + row, live, D, TILE.pairs, MODES.interleaved)
        out = n.to(tl.int64) * HEADS + h
        rstd = tl.load(rstds + out, live, other=0)
        if ROTATE and MODES.norm_first:
            g1, g2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
        if MODES.norm_first or weight is not None:  # saved is x
            if ROTATE and not MODES.norm_first:
                n1, n2 = n1 * cos - n2 * sin, n2 * cos + n1 * sin
            n1, n2 = n1 * rstd, n2 * rstd
        if weight is not None:
            dw1 += g1 * n1
            dw2 += g2 * n2
            w1, w2 = _load_pairs(weight, True, D, TILE.pairs, MODES.interleaved)
            g1, g2 = g1 * w1, g2 * w2
        mean = _mean(g1 * n1 + g2 * n2, D)
        d1, d2 = rstd * (g1 - n1 * mean), rstd * (g2 - n2 * mean)
        if ROTATE and not MODES.norm_first:
            d1, d2 = d1 * cos + d2 * sin, d2 * cos - d1 * sin
        _store_pairs(dxs + out * D, d1, d2, live, D, TILE.pairs, MODES.interleaved)
    return dw1, dw2


@triton.jit
def _row(n, h, T, sample, token, head):
    """Return the offset of head h of token n (of all samples)."""
    b, t = (n // T).to(tl.int64), (n % T).to(tl.int64)
    return b * sample + t * token + h.to(tl.int64) * head


@triton.jit
def _angles(x, tables, strides, n, T, tokens, D: tl.constexpr, PAIRS: tl.constexpr):
    """Return cos and sin [tokens, 1, PAIRS] of the tokens n, in the dtype of arithmetic of x."""
    c = tl.arange(0, PAIRS)[None, None, :]
    live = (n < tokens) & (c < D // 2)
    b, t = (n // T).to(tl.int64), (n % T).to(tl.int64)
    cos = _load_angles(tables[0], b, t, c, strides[0], live)
    sin = _load_angles(tables[1], b, t, c, strides[len(strides) - 1], live)
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    return cos.to(dtype), sin.to(dtype)


@triton.jit
def _load_angles(table, b, t, c, strides, live):
    at = b * strides[0] + t * strides[1] + c.to(tl.int64) * strides[2]
    return tl.load(table + at, live, other=0)


@triton.jit
def _load_pairs(row, live, D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return the pairs (x1, x2) of rows of D elements, each [.., .., PAIRS]."""
    HALF: tl.constexpr = (D + 1) // 2
    if INTERLEAVED:
        c = tl.arange(0, 2 * PAIRS)[None, None, :]
        x = tl.load(row + c, live & (c < D), other=0)
        x1, x2 = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], PAIRS, 2)))
    else:
        c = tl.arange(0, PAIRS)[None, None, :]
        x1 = tl.load(row + c, live & (c < HALF), other=0)
        x2 = tl.load(row + HALF + c, live & (c < D - HALF), other=0)
    return wide(x1), wide(x2)


@triton.jit
def _store_pairs(
    row, x1, x2, live, D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    HALF: tl.constexpr = (D + 1) // 2
    dtype: tl.constexpr = row.dtype.element_ty
    if INTERLEAVED:
        c = tl.arange(0, 2 * PAIRS)[None, None, :]
        x = tl.reshape(tl.join(x1, x2), (x1.shape[0], x1.shape[1], 2 * PAIRS))
        tl.store(row + c, x.to(dtype), live & (c < D))
    else:
        c = tl.arange(0, PAIRS)[None, None, :]
        tl.store(row + c, x1.to(dtype), live & (c < HALF))
        tl.store(row + HALF + c, x2.to(dtype), live & (c < D - HALF))


@triton.jit
def _store_sum(row, x1, x2, D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Store the sum over tokens and heads."""
    x1 = tl.sum(tl.sum(x1, 1, keep_dims=True), 0, keep_dims=True)
    x2 = tl.sum(tl.sum(x2, 1, keep_dims=True), 0, keep_dims=True)
    _store_pairs(row, x1, x2, True, D, PAIRS, INTERLEAVED)


@triton.jit
def _mean(t, D: tl.constexpr):
    return tl.sum(t, 2, keep_dims=True) / D
