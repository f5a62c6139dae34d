"""The kernel pair of rope, qk_norm and rope_qk_norm: RMSNorm over a head and rotation of its pairs.

R rotates the pair (x1, x2): o1 = x1 cos - x2 sin, o2 = x2 cos + x1 sin; tables need not be unit.

    rotation first   u = R x     n = u * rstd(u)            y = n * w
    norm first       n = x * rstd(x)                        y = R (n * w)

Backward, with R^T the transposed rotation and g what reaches n * w:

    rotation first   g = dy      du = norm'(g * w, n)       dx = R^T du
    norm first       g = R^T dy                             dx = norm'(g * w, n)
    dw = sum g * n   norm'(g, n) = rstd * (g - n * mean(g * n))

n is the result y itself where rotation comes first and there is no weight; else it is computed
again from the input.

Bytes, in passes over q or k: forward 1 read and 1 written of each, backward 2 and 1, and the row of
a table once a token for all heads of q and k. Launch: a program owns whole tokens, q and k, all
heads; a tile is [tokens, heads, pairs], 8 neighbours of the first halves and their 8 partners a
thread: 16 bytes of bf16. With a weight, partial rows of dw are added by a second launch.
"""

import triton
import triton.language as tl

from mvsplit_ops._host import (
    ceil_div,
    dense,
    new,
    power_of_two,
    require_heads,
    tables,
    with_rows,
)
from mvsplit_ops.triton_kernels._common import launch, new_statistics, sum_rows, wide

# Pairs of a tile, its warps: 8 pairs a thread, of bf16 two 16-byte loads in flight forward and four
# backward. Twice the tile took 90 registers in place of 54 and more exchanges of the angles.
TILE, WARPS = 1024, 4
MOST_HEADS = 8  # of a tile; more are taken in turns, against the same angles
MOST_PARTIALS = 1024  # rows of dw: some programs for each of 132 SMs, and little to add


def forward(xs, weights, angles, eps, *, interleaved, conjugate, norm, norm_first):
    """Of x, or of q and k: [result], [rstd or None]."""
    xs, weights = [with_rows(x) for x in xs], dense(*weights)
    ys = [new(x, x.shape) for x in xs]
    rstds = [new_statistics(x, *x.shape[:3]) if norm else None for x in xs]
    angles, table_strides = tables(angles, xs[0])
    strides = tuple(x.stride()[:3] for x in xs)
    tokens, options = _options(xs, angles, interleaved, conjugate, norm_first)
    launch(
        _fwd,
        ceil_div(tokens, options["BLOCK_T"]),
        xs[0],
        *(tuple(xs), tuple(weights), angles, tuple(ys), tuple(rstds), strides, table_strides),
        *(xs[0].shape[1], tokens),
        EPS=eps,
        NORM=norm,
        **options,
    )
    return ys, rstds


def backward(dys, kept, rstds, weights, angles, *, interleaved, conjugate, norm_first):
    """Of q and k: [dx], [dw; empty without a weight]."""
    require_heads(dys, kept, rstds, weights)
    dys, kept = [with_rows(t) for t in dys], [with_rows(t) for t in kept]
    rstds, weights = dense(*rstds), dense(*weights)
    dxs = [new(x, x.shape) for x in kept]
    angles, table_strides = tables(angles, kept[0])
    strides = tuple((*dy.stride()[:3], *x.stride()[:3]) for dy, x in zip(dys, kept, strict=True))
    tokens, options = _options(kept, angles, interleaved, conjugate, norm_first)
    per_program, weighted = options["BLOCK_T"], sum(w is not None for w in weights)
    if weighted:
        share = ceil_div(tokens, MOST_PARTIALS)
        per_program *= max(1, ceil_div(share, per_program))
    programs = ceil_div(tokens, per_program)
    partials = new_statistics(kept[0], weighted, programs, kept[0].shape[3])
    launch(
        _bwd,
        programs,
        kept[0],
        *(tuple(dys), tuple(kept), tuple(rstds), tuple(weights), angles, tuple(dxs), partials),
        *(strides, table_strides, kept[0].shape[1], tokens, per_program),
        TOGETHER=1 if weighted else 2,  # the sums of dw of both would not fit the registers
        **options,
    )
    dweights = iter(sum_rows(partials) if weighted else ())
    none = (new_statistics(kept[0], 0) for _ in weights)
    return dxs, [next(none) if w is None else next(dweights) for w in weights]


def _options(xs, angles, interleaved, conjugate, norm_first):
    """The number of tokens, and the constants of a kernel."""
    B, T, _, D = xs[0].shape
    pairs = power_of_two(ceil_div(D, 2))
    heads = tuple(x.shape[2] for x in xs)
    block_h = min(power_of_two(max(heads)), MOST_HEADS)
    return B * T if D else 0, {
        "HEADS": heads,
        "D": D,
        "BLOCK_T": max(1, TILE // (block_h * pairs)),
        "BLOCK_H": block_h,
        "BLOCK_C": pairs,
        "ROTATE": bool(angles),
        "INTERLEAVED": interleaved,
        "CONJUGATE": conjugate,
        "NORM_FIRST": norm_first,
        "num_warps": WARPS,
    }


@triton.jit(do_not_specialize=["T", "tokens"])
def _fwd(
    xs,
    weights,
    tables,
    ys,
    rstds,
    strides,
    table_strides,
    T,
    tokens,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    if ROTATE:
        cos, sin = _angles(tables, table_strides, n, T, tokens, D, BLOCK_C, CONJUGATE)
    for i in tl.static_range(len(HEADS)):
        for first in tl.range(0, HEADS[i], BLOCK_H):
            h = first + tl.arange(0, BLOCK_H)[None, :, None]
            live = (n < tokens) & (h < HEADS[i])
            row = _row(n, h, T, strides[i][0], strides[i][1], strides[i][2])
            x1, x2 = _load_pairs(xs[i] + row, live, D, BLOCK_C, INTERLEAVED)
            if ROTATE and not NORM_FIRST:
                x1, x2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
            out = n.to(tl.int64) * HEADS[i] + h
            if NORM:
                rstd = tl.rsqrt(_mean(x1 * x1 + x2 * x2, D) + EPS)
                x1, x2 = x1 * rstd, x2 * rstd
                tl.store(rstds[i] + out, rstd, live)
            if weights[i] is not None:
                w1, w2 = _load_pairs(weights[i], True, D, BLOCK_C, INTERLEAVED)
                x1, x2 = x1 * w1, x2 * w2
            if ROTATE and NORM_FIRST:
                x1, x2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
            _store_pairs(ys[i] + out * D, x1, x2, live, D, BLOCK_C, INTERLEAVED)


@triton.jit(do_not_specialize=["T", "tokens", "per_program"])
def _bwd(
    dys,
    kept,
    rstds,
    weights,
    tables,
    dxs,
    partials,
    strides,
    table_strides,
    T,
    tokens,
    per_program,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    pid = tl.program_id(0)
    begin = pid * per_program
    zero = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_C), rstds[0].dtype.element_ty)
    for part in tl.static_range(0, 2, TOGETHER):
        dw1, dw2 = zero, zero
        for token in range(begin, min(begin + per_program, tokens), BLOCK_T):
            n = token + tl.arange(0, BLOCK_T)[:, None, None]
            if ROTATE:
                cos, sin = _angles(tables, table_strides, n, T, tokens, D, BLOCK_C, CONJUGATE)
            else:
                cos, sin = 1.0, 0.0
            for i in tl.static_range(part, part + TOGETHER):
                dw1, dw2 = _bwd_heads(
                    dys[i],
                    kept[i],
                    rstds[i],
                    weights[i],
                    dxs[i],
                    strides[i],
                    n,
                    T,
                    tokens,
                    cos,
                    sin,
                    dw1,
                    dw2,
                    HEADS[i],
                    D,
                    BLOCK_H,
                    BLOCK_C,
                    ROTATE,
                    INTERLEAVED,
                    NORM_FIRST,
                )
        if weights[part] is not None:
            _store_sum(partials + pid * D, dw1, dw2, D, BLOCK_C, INTERLEAVED)
            partials += tl.num_programs(0) * D


@triton.jit
def _bwd_heads(
    dys,
    kept,
    rstds,
    weight,
    dxs,
    strides,
    n,
    T,
    tokens,
    cos,
    sin,
    dw1,
    dw2,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM_FIRST: tl.constexpr,
):
    """dx of all heads of the tokens n, and dw with their part added."""
    for first in tl.range(0, HEADS, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)[None, :, None]
        live = (n < tokens) & (h < HEADS)
        row = _row(n, h, T, strides[0], strides[1], strides[2])
        g1, g2 = _load_pairs(dys + row, live, D, BLOCK_C, INTERLEAVED)
        row = _row(n, h, T, strides[3], strides[4], strides[5])
        n1, n2 = _load_pairs(kept + row, live, D, BLOCK_C, INTERLEAVED)
        out = n.to(tl.int64) * HEADS + h
        rstd = tl.load(rstds + out, live, other=0)
        if ROTATE and NORM_FIRST:
            g1, g2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
        if NORM_FIRST or weight is not None:  # kept is x
            if ROTATE and not NORM_FIRST:
                n1, n2 = n1 * cos - n2 * sin, n2 * cos + n1 * sin
            n1, n2 = n1 * rstd, n2 * rstd
        if weight is not None:
            dw1 += g1 * n1
            dw2 += g2 * n2
            w1, w2 = _load_pairs(weight, True, D, BLOCK_C, INTERLEAVED)
            g1, g2 = g1 * w1, g2 * w2
        mean = _mean(g1 * n1 + g2 * n2, D)
        d1, d2 = rstd * (g1 - n1 * mean), rstd * (g2 - n2 * mean)
        if ROTATE and not NORM_FIRST:
            d1, d2 = d1 * cos + d2 * sin, d2 * cos - d1 * sin
        _store_pairs(dxs + out * D, d1, d2, live, D, BLOCK_C, INTERLEAVED)
    return dw1, dw2


@triton.jit
def _row(n, h, T, sample, token, head):
    """Where head h of token n (of all samples) begins."""
    b, t = (n // T).to(tl.int64), (n % T).to(tl.int64)
    return b * sample + t * token + h.to(tl.int64) * head


@triton.jit
def _angles(
    tables, strides, n, T, tokens, D: tl.constexpr, BLOCK_C: tl.constexpr, CONJUGATE: tl.constexpr
):
    """cos and sin [BLOCK_T, 1, BLOCK_C] of the tokens n."""
    c = tl.arange(0, BLOCK_C)[None, None, :]
    at = (n // T).to(tl.int64) * strides[0] + (n % T).to(tl.int64) * strides[1] + c
    live = (n < tokens) & (c < D // 2)
    cos = wide(tl.load(tables[0] + at, live, other=0))
    sin = wide(tl.load(tables[1] + at, live, other=0))
    return cos, -sin if CONJUGATE else sin


@triton.jit
def _load_pairs(row, live, D: tl.constexpr, BLOCK_C: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The pairs (x1, x2) of rows of D elements, each [.., .., BLOCK_C]."""
    HALF: tl.constexpr = (D + 1) // 2
    if INTERLEAVED:
        c = tl.arange(0, 2 * BLOCK_C)[None, None, :]
        x = tl.load(row + c, live & (c < D), other=0)
        x1, x2 = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], BLOCK_C, 2)))
    else:
        c = tl.arange(0, BLOCK_C)[None, None, :]
        x1 = tl.load(row + c, live & (c < HALF), other=0)
        x2 = tl.load(row + HALF + c, live & (c < D - HALF), other=0)
    return wide(x1), wide(x2)


@triton.jit
def _store_pairs(
    row, x1, x2, live, D: tl.constexpr, BLOCK_C: tl.constexpr, INTERLEAVED: tl.constexpr
):
    HALF: tl.constexpr = (D + 1) // 2
    dtype: tl.constexpr = row.dtype.element_ty
    if INTERLEAVED:
        c = tl.arange(0, 2 * BLOCK_C)[None, None, :]
        x = tl.reshape(tl.join(x1, x2), (x1.shape[0], x1.shape[1], 2 * BLOCK_C))
        tl.store(row + c, x.to(dtype), live & (c < D))
    else:
        c = tl.arange(0, BLOCK_C)[None, None, :]
        tl.store(row + c, x1.to(dtype), live & (c < HALF))
        tl.store(row + HALF + c, x2.to(dtype), live & (c < D - HALF))


@triton.jit
def _store_sum(row, x1, x2, D: tl.constexpr, BLOCK_C: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The sum over tokens and heads."""
    x1 = tl.sum(tl.sum(x1, 1, keep_dims=True), 0, keep_dims=True)
    x2 = tl.sum(tl.sum(x2, 1, keep_dims=True), 0, keep_dims=True)
    _store_pairs(row, x1, x2, True, D, BLOCK_C, INTERLEAVED)


@triton.jit
def _mean(t, D: tl.constexpr):
    return tl.sum(t, 2, keep_dims=True) / D
