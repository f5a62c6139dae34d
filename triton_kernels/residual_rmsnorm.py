"""The plain residual with RMSNorm: z = x + scale * f, y = z * rstd * weight; see _merge.py.

    dx = dz    df = scale * dz    dscale = sum dz * f    dweight = sum dy * n

Bytes, in passes: forward 2 read and 1 written. Backward without parameters 2 and 1: n is y, and df
is dx. Backward with only a weight 3 and 1, with a scale 3 and 2: n is computed from x and f, which
dscale needs anyway.
Launch: as in _merge.py; a second launch adds partial rows of dscale and dweight.
Deterministic: the order of every sum depends only on the shape.
"""

import triton
import triton.language as tl
from torch import Tensor

from mvsplit_ops._host import (
    ceil_div,
    new_empty,
    new_statistics,
    require_residual,
    to_contiguous,
)
from mvsplit_ops.triton_kernels._common import find_missing, launch, sum_rows
from mvsplit_ops.triton_kernels._merge import (
    BLOCK_TILES,
    add_block,
    choose_tile,
    load_rows,
    load_vector,
    mean_d,
    rows_per_program,
    store_rows,
    summed_rows_per_program,
    tile_rows,
)

__all__ = ["find_missing", "residual_rmsnorm_bwd", "residual_rmsnorm_fwd"]


def residual_rmsnorm_fwd(
    x: Tensor, f: Tensor, scale: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x, f = x.contiguous(), f.contiguous()
    scale, weight = to_contiguous(scale, weight)
    B, T, D = x.shape
    y, rstd, N = new_empty(x, x.shape), new_statistics(x, B, T), B * T
    share = rows_per_program(N)
    tensors = x, f, scale, weight, y, rstd
    launch(_fwd, ceil_div(N, share), x, *tensors, N, share, EPS=eps, **choose_tile(D))
    return y, rstd


def residual_rmsnorm_bwd(
    dy: Tensor,
    saved: Tensor,
    f: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, ...]:
    B, T, D = dy.shape
    require_residual(dy, saved, f, scale, weight, rstd)
    dy, saved, rstd = to_contiguous(dy, saved, rstd)
    f, *params = to_contiguous(f, scale, weight)
    N = B * T
    dx, df = new_empty(dy, dy.shape), new_empty(dy, 0 if scale is None else dy.shape)
    tile = choose_tile(D, "plain" if weight is None else "weighted backward")
    outputs = sum(p is not None for p in params)
    share = summed_rows_per_program(N, tile) if outputs else rows_per_program(N)
    programs = ceil_div(N, share)
    partials = new_statistics(dy, outputs, programs, D)
    tensors = dy, saved, f, *params, rstd, dx, df, partials
    launch(_bwd, programs, dy, *tensors, N, share, **tile)
    sums = iter(sum_rows(partials) if outputs else ())
    return dx, df, *(new_statistics(dy, 0) if p is None else next(sums) for p in params)


@triton.jit(do_not_specialize=["N", "share"])
def _fwd(
    x,
    f,
    scale,
    weight,
    y,
    rstds,
    N,
    share,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EPS: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    if scale is not None:
        s = load_vector(scale, d, D)[None, :]
    if weight is not None:
        w = load_vector(weight, d, D)[None, :]
    begin = tl.program_id(0).to(N.dtype) * share
    end = min(begin + share, N)
    for first in range(begin, end, ROWS):
        r = first + tl.arange(0, ROWS)
        live = r < end
        z = load_rows(x, r, d, live, D)
        g = load_rows(f, r, d, live, D)
        z += g * s if scale is not None else g
        rstd = tl.rsqrt(mean_d(z * z, D) + EPS)
        n = z * rstd[:, None]
        store_rows(y, r, d, n * w if weight is not None else n, live, D)
        tl.store(rstds + r, rstd, live)


@triton.jit(do_not_specialize=["N", "share"])
def _bwd(
    dy,
    saved,
    f,
    scale,
    weight,
    rstds,
    dx,
    df,
    partials,
    N,
    share,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    if scale is not None:
        s = load_vector(scale, d, D)[None, :]
    if weight is not None:
        w = load_vector(weight, d, D)[None, :]
    partials += tl.program_id(0).to(tl.int64) * D + d
    next_sum = tl.num_programs(0).to(tl.int64) * D
    begin = tl.program_id(0).to(N.dtype) * share
    end = min(begin + share, N)
    for block in range(begin, end, ROWS * BLOCK_TILES):
        dscale = tl.zeros((BLOCK_D,), rstds.dtype.element_ty)
        dweight = dscale
        for first in range(block, min(block + ROWS * BLOCK_TILES, end), ROWS):
            r = tile_rows(first, ROWS)
            live = r < end
            rstd = tl.load(rstds + r, live, other=0)[:, None]
            g = load_rows(dy, r, d, live, D)
            n = load_rows(saved, r, d, live, D)
            if f is not None:  # saved is x
                branch = load_rows(f, r, d, live, D)
                n += branch * s if scale is not None else branch
                n *= rstd
            if weight is not None:
                dweight += tl.sum(g * n, 0)
                g *= w
            dz = rstd * (g - n * mean_d(g * n, D)[:, None])
            store_rows(dx, r, d, dz, live, D)
            if scale is not None:
                store_rows(df, r, d, dz * s, live, D)
                dscale += tl.sum(dz * branch, 0)
        row = partials
        if scale is not None:
            add_block(row, dscale, d < D, block > begin)
            row += next_sum
        if weight is not None:
            add_block(row, dweight, d < D, block > begin)
