"""The plain residual with RMSNorm: z = x + scale * f, y = z * rstd * weight; see _merge.py.

    dx = dz    df = scale * dz    dscale = sum dz * f    dweight = sum dy * n

Bytes, in passes: forward 2 read and 1 written. Backward without parameters 2 and 1: n is y, df is
dx. With a scale 3 and 2: n comes from x and f, which are read for dscale in any case. Partial rows
of dscale and dweight are added by a second launch, in a fixed order.
"""

import triton
import triton.language as tl

from mvsplit_ops._host import ceil_div, dense, new, require_residual
from mvsplit_ops.triton_kernels._common import launch, missing, new_statistics, sum_rows
from mvsplit_ops.triton_kernels._merge import (
    load_rows,
    load_vector,
    mean_d,
    rows_per_program,
    store_rows,
    tile,
)

__all__ = ["missing", "residual_rmsnorm_bwd", "residual_rmsnorm_fwd"]


def residual_rmsnorm_fwd(x, f, scale, weight, eps):
    x, f, scale, weight = dense(x, f, scale, weight)
    B, T, D = x.shape
    y, rstd, N = new(x, x.shape), new_statistics(x, B, T), B * T
    share = rows_per_program(N)
    launch(_fwd, ceil_div(N, share), x, x, f, scale, weight, y, rstd, N, share, EPS=eps, **tile(D))
    return y, rstd


def residual_rmsnorm_bwd(dy, kept, f, scale, weight, rstd):
    B, T, D = dy.shape
    require_residual(dy, kept, f, scale, weight, rstd)
    dy, kept, f, rstd, *params = dense(dy, kept, f, rstd, scale, weight)
    N = B * T
    dx, df = new(dy, dy.shape), new(dy, 0 if scale is None else dy.shape)
    share = rows_per_program(N)
    programs, given = ceil_div(N, share), sum(p is not None for p in params)
    partials = new_statistics(dy, given, programs, D)
    tensors = dy, kept, f, *params, rstd, dx, df, partials
    kind = "plain" if weight is None else "weighted backward"
    launch(_bwd, programs, dy, *tensors, N, share, **tile(D, kind))
    sums = iter(sum_rows(partials) if given else ())
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
    begin = tl.program_id(0) * share
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
    kept,
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
    dscale = tl.zeros((BLOCK_D,), rstds.dtype.element_ty)
    dweight = dscale
    if scale is not None:
        s = load_vector(scale, d, D)[None, :]
    if weight is not None:
        w = load_vector(weight, d, D)[None, :]
    begin = tl.program_id(0) * share
    end = min(begin + share, N)
    for first in range(begin, end, ROWS):
        r = first + tl.arange(0, ROWS)
        live = r < end
        rstd = tl.load(rstds + r, live, other=0)[:, None]
        g = load_rows(dy, r, d, live, D)
        n = load_rows(kept, r, d, live, D)
        if f is not None:  # kept is x
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
    partials += tl.program_id(0) * D + d
    if scale is not None:
        tl.store(partials, dscale, d < D)
        partials += tl.num_programs(0) * D
    if weight is not None:
        tl.store(partials, dweight, d < D)
