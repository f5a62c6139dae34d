"""MV-Split residual with RMSNorm (arXiv 2605.06169), J the token mean of a segment, P = I - J.

    z = x + beta * P f + alpha * J (f - x)      y = z * rstd * weight
      = x + beta * f + shift                    shift = (alpha - beta) * jf - alpha * jx

With dz and n as in _merge.py, and jdz = J dz:

    dx = dz - alpha * jdz      dalpha = sum_{b,s} Ts * jdz * (jf - jx)
    df = beta * dz + (alpha - beta) * jdz      dbeta = sum dz * (f - jf)

dbeta is summed of centred f: where the token mean dominates, sum dz * f less its mean's part would
be the small difference of large numbers.

Bytes, in passes: must move 3 forward, 5 backward. Here, by two sweeps:

    forward   _means 2 read (1 when jx is given), _apply 2 read and 1 written
    backward  _bwd_reduce 3 read, _bwd_means partial rows alone, _bwd_apply 2 read and 2 written
              (_bwd_apply 3 read with a weight: n comes from x and f)

The second sweep walks from the last sample to the first, so that it begins with what the first
sweep left in L2. No float atomics: partial rows are added in a fixed order.
"""

import torch
import triton
import triton.language as tl

from mvsplit_ops._host import (
    blocks,
    ceil_div,
    dense,
    new,
    power_of_two,
    require_merge,
)
from mvsplit_ops.triton_kernels._common import column_sum, launch, missing, new_statistics, wide
from mvsplit_ops.triton_kernels._merge import (
    load_rows,
    load_vector,
    mean_d,
    rows_per_program,
    store_rows,
    tile,
)
from mvsplit_ops.triton_kernels._segments import block_tokens, ends, segment_tokens

__all__ = ["missing", "mvsplit_rmsnorm_bwd", "mvsplit_rmsnorm_fwd"]

# Column sums over tokens need no exchange between programs that own columns: 64 of them, 128 bytes
# of bf16, are a whole line; 64 rows of a tile put four 16-byte loads of x and of f in flight.
MEANS = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4}
# _bwd_apply knows the rows' means, so that its tiles need not span D: 128 columns are 16 lanes of
# 16 bytes; 64 rows of a program make its three vectors under 1/10 pass.
APPLY = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}
APPLY_ROWS = 64
# Partial rows and parameter gradients: 32 columns of fp32, 128 bytes, 32 rows at a time.
REDUCE = {"ROWS": 32, "COLUMNS": 32, "num_warps": 4}
# The last block of a segment adds up the column sums of y that the others left: at most so many.
MOST_CARRIED = 32


def mvsplit_rmsnorm_fwd(x, f, alpha, beta, weight, jx, segments, eps, carry):
    B, T, D = x.shape
    S, at = len(segments), ends(segments)
    x, f, alpha, beta, weight, given = dense(x, f, alpha, beta, weight, jx)
    y, rstd = new(x, x.shape), new_statistics(x, B, T)
    jx = new_statistics(x, *(0,) if given is not None else (B, S, D))
    jf, shift = (new_statistics(x, B, S, D) for _ in range(2))
    share = rows_per_program(B * T)
    jy, partials, tickets = new_statistics(x, 0), None, None
    if carry:
        share = max(share, ceil_div(max(segments), MOST_CARRIED))
        jy, partials = (new_statistics(x, B, n, D) for n in (S, blocks(segments, share)))
        tickets = new(x, (B, S), torch.int32)
    count = blocks(segments, share)
    launch(
        _means,
        B * S * ceil_div(D, MEANS["COLUMNS"]),
        x,
        *(x, f, alpha, beta, given, jx, jf, shift, tickets, at, T),
        D=D,
        **MEANS,
    )
    launch(
        _apply,
        B * count,
        x,
        *(x, f, beta, shift, weight, y, rstd, partials, tickets, jy, at, T, share, count),
        EPS=eps,
        **tile(D),
    )
    return y, jy, rstd, jx, jf


def mvsplit_rmsnorm_bwd(dy, kept, f, alpha, beta, weight, rstd, jx, jf, segments):
    B, T, D = dy.shape
    S, at = len(segments), ends(segments)
    require_merge(dy, kept, f, alpha, beta, weight, rstd, jx, jf, segments)
    dy, kept, f, rstd, jx, jf = dense(dy, kept, f, rstd, jx, jf)
    alpha, beta, weight = dense(alpha, beta, weight)
    params = 2 if weight is None else 3
    share = rows_per_program(B * T)
    count = blocks(segments, share)
    partials = new_statistics(dy, params, B * count, D)
    mean, jdz = new_statistics(dy, B, T), new_statistics(dy, B, S, D)
    parts = new_statistics(dy, params, B * S, D)
    dx, df = new(dy, dy.shape), new(dy, dy.shape)
    dparams = [new_statistics(dy, D) for _ in range(params)]
    launch(
        _bwd_reduce,
        B * count,
        dy,
        *(dy, kept, f, alpha, beta, weight, rstd, jx, jf, mean, partials, at, T, share, count),
        **tile(D, "plain" if weight is None else "weighted backward"),
    )
    launch(
        _bwd_means,
        B * S * ceil_div(D, REDUCE["COLUMNS"]),
        dy,
        *(partials, jx, jf, jdz, parts, at, B, share, count),
        D=D,
        PARAMS=params,
        **REDUCE,
    )
    columns = min(APPLY["COLUMNS"], power_of_two(D))
    reducers, count = ceil_div(D, columns), blocks(segments, APPLY_ROWS)
    launch(
        _bwd_apply,
        reducers * (1 + B * count),
        dy,
        *(dy, kept, f, alpha, beta, weight, rstd, jx, jf, mean, jdz, parts, dx, df),
        *(tuple(dparams), at, B, T, APPLY_ROWS, count),
        D=D,
        **{**APPLY, "COLUMNS": columns},
    )
    return dx, df, *dparams, *([] if weight is not None else [new_statistics(dy, 0)])


@triton.jit(do_not_specialize=["T"])
def _means(
    x,
    f,
    alpha,
    beta,
    given,
    jxs,
    jfs,
    shifts,
    tickets,
    ends,
    T,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    slices = tl.cdiv(D, COLUMNS)
    unit, part = tl.program_id(0) // slices, tl.program_id(0) % slices
    b, segment = unit // len(ends), unit % len(ends)
    begin, end, _, _ = segment_tokens(segment, ends, 1)
    d = part * COLUMNS + tl.arange(0, COLUMNS)
    sum_x = tl.zeros((ROWS, COLUMNS), jfs.dtype.element_ty)
    sum_f = sum_x
    for first in range(begin, end, ROWS):
        t = first + tl.arange(0, ROWS)
        sum_f += load_rows(f, b * T + t, d, t < end, D)
        if given is None:
            sum_x += load_rows(x, b * T + t, d, t < end, D)
    at = unit.to(tl.int64) * D + d
    jf = tl.sum(sum_f, 0) / (end - begin)
    if given is None:
        jx = tl.sum(sum_x, 0) / (end - begin)
        tl.store(jxs + at, jx, d < D)
    else:
        jx = tl.load(given + at, d < D, other=0)
    tl.store(jfs + at, jf, d < D)
    tl.store(shifts + at, _shift(alpha, beta, jx, jf, d, D), d < D)
    if tickets is not None and part == 0:
        tl.store(tickets + unit, 0)


@triton.jit
def _shift(alpha, beta, jx, jf, d, D: tl.constexpr):
    a, b = load_vector(alpha, d, D), load_vector(beta, d, D)
    return (a - b) * jf - a * jx


@triton.jit(do_not_specialize=["T", "share", "count"])
def _apply(
    x,
    f,
    beta,
    shifts,
    weight,
    y,
    rstds,
    partials,
    tickets,
    jys,
    ends,
    T,
    share,
    count,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EPS: tl.constexpr,
):
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    b, block = pid // count, pid % count
    segment, begin, end = block_tokens(block, ends, share)
    unit = b * len(ends) + segment
    d = tl.arange(0, BLOCK_D)
    bt = load_vector(beta, d, D)[None, :]
    shift = load_vector(shifts + unit.to(tl.int64) * D, d, D)[None, :]
    if weight is not None:
        w = load_vector(weight, d, D)[None, :]
    sum_y = tl.zeros((BLOCK_D,), rstds.dtype.element_ty)
    for first in range(begin, end, ROWS):
        t = first + tl.arange(0, ROWS)
        r, live = b * T + t, t < end
        z = load_rows(x, r, d, live, D) + bt * load_rows(f, r, d, live, D) + shift
        rstd = tl.rsqrt(mean_d(z * z, D) + EPS)
        out = z * rstd[:, None]
        if weight is not None:
            out *= w
        out = out.to(y.dtype.element_ty)
        store_rows(y, r, d, out, live, D)
        tl.store(rstds + r, rstd, live)
        if partials is not None:
            sum_y += tl.sum(tl.where(live[:, None], wide(out), 0), 0)
    if partials is not None:
        tl.store(partials + pid.to(tl.int64) * D + d, sum_y, d < D)
        _add_up_last(partials, tickets, jys, unit, b * count, segment, ends, share, D, BLOCK_D)


@triton.jit
def _add_up_last(
    partials, tickets, jys, unit, base, segment, ends, share, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Of the programs of a segment, the last to come adds up the rows that they have stored."""
    begin, end, first, total = segment_tokens(segment, ends, share)
    tl.debug_barrier()  # all threads have stored before one of them tells
    if tl.atomic_add(tickets + unit, 1, sem="acq_rel") == total - 1:
        d = tl.arange(0, BLOCK_D)
        rows = partials + (base + first).to(tl.int64) * D
        jy = column_sum(rows, total, d, D, 4) / (end - begin)
        tl.store(jys + unit.to(tl.int64) * D + d, jy, d < D)


@triton.jit(do_not_specialize=["T", "share", "count"])
def _bwd_reduce(
    dy,
    kept,
    f,
    alpha,
    beta,
    weight,
    rstds,
    jxs,
    jfs,
    means,
    partials,
    ends,
    T,
    share,
    count,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """mean_d(g * n) of each row, and partial rows of dz, dz * (f - jf) and dy * n."""
    pid = tl.program_id(0)
    b, block = pid // count, pid % count
    segment, begin, end = block_tokens(block, ends, share)
    at = (b * len(ends) + segment).to(tl.int64) * D
    d = tl.arange(0, BLOCK_D)
    jf = load_vector(jfs + at, d, D)
    if weight is not None:
        w, bt = load_vector(weight, d, D)[None, :], load_vector(beta, d, D)[None, :]
        shift = _shift(alpha, beta, load_vector(jxs + at, d, D), jf, d, D)[None, :]
    sum_dz = tl.zeros((BLOCK_D,), rstds.dtype.element_ty)
    sum_dzf, sum_dyn = sum_dz, sum_dz
    for first in range(begin, end, ROWS):
        t = first + tl.arange(0, ROWS)
        r, live = b * T + t, t < end
        rstd = tl.load(rstds + r, live, other=0)[:, None]
        g = load_rows(dy, r, d, live, D)
        n = load_rows(kept, r, d, live, D)
        branch = load_rows(f, r, d, live, D)
        if weight is not None:  # kept is x
            n = (n + bt * branch + shift) * rstd
            sum_dyn += tl.sum(g * n, 0)
            g *= w
        mean = mean_d(g * n, D)
        dz = rstd * (g - n * mean[:, None])
        sum_dz += tl.sum(dz, 0)
        sum_dzf += tl.sum(dz * (branch - jf[None, :]), 0)
        tl.store(means + r, mean, live)
    partials += pid.to(tl.int64) * D + d
    stride = tl.num_programs(0).to(tl.int64) * D
    tl.store(partials, sum_dz, d < D)
    tl.store(partials + stride, sum_dzf, d < D)
    if weight is not None:
        tl.store(partials + 2 * stride, sum_dyn, d < D)


@triton.jit(do_not_specialize=["B", "share", "count"])
def _bwd_means(
    partials,
    jxs,
    jfs,
    jdzs,
    parts,
    ends,
    B,
    share,
    count,
    D: tl.constexpr,
    PARAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """jdz of a segment, and its part of dalpha, dbeta and dweight."""
    slices = tl.cdiv(D, COLUMNS)
    unit = tl.program_id(0) // slices
    b, segment = unit // len(ends), unit % len(ends)
    begin, end, first, total = segment_tokens(segment, ends, share)
    d = (tl.program_id(0) % slices) * COLUMNS + tl.arange(0, COLUMNS)
    at = unit.to(tl.int64) * D + d
    rows = partials + (b * count + first).to(tl.int64) * D
    sum_dz = column_sum(rows, total, d, D, ROWS)
    jx = tl.load(jxs + at, d < D, other=0)
    jf = tl.load(jfs + at, d < D, other=0)
    tl.store(jdzs + at, sum_dz / (end - begin), d < D)
    tl.store(parts + at, sum_dz * (jf - jx), d < D)
    row, part = (B * count).to(tl.int64) * D, (B * len(ends)).to(tl.int64) * D
    for i in tl.static_range(1, PARAMS):
        tl.store(parts + i * part + at, column_sum(rows + i * row, total, d, D, ROWS), d < D)


@triton.jit(do_not_specialize=["B", "T", "share", "count"])
def _bwd_apply(
    dy,
    kept,
    f,
    alpha,
    beta,
    weight,
    rstds,
    jxs,
    jfs,
    means,
    jdzs,
    parts,
    dx,
    df,
    dparams,
    ends,
    B,
    T,
    share,
    count,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx and df; the first programs add up the parameters' gradients instead."""
    slices: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    pid = tl.program_id(0)
    d = (pid % slices) * COLUMNS + tl.arange(0, COLUMNS)
    units = B * len(ends)
    if pid < slices:
        for i in tl.static_range(len(dparams)):
            part = parts + i * units.to(tl.int64) * D
            tl.store(dparams[i] + d, column_sum(part, units, d, D, ROWS), d < D)
    else:
        block = (tl.num_programs(0) - 1 - pid) // slices
        b, block = block // count, block % count
        segment, begin, end = block_tokens(block, ends, share)
        at = (b * len(ends) + segment).to(tl.int64) * D
        bt, jdz = load_vector(beta, d, D), load_vector(jdzs + at, d, D)
        to_dx = load_vector(alpha, d, D) * jdz
        to_df = bt * jdz - to_dx  # the negative of what is added
        bt, to_dx, to_df = bt[None, :], to_dx[None, :], to_df[None, :]
        if weight is not None:
            w = load_vector(weight, d, D)[None, :]
            jx, jf = load_vector(jxs + at, d, D), load_vector(jfs + at, d, D)
            shift = _shift(alpha, beta, jx, jf, d, D)[None, :]
        for first in range(begin, end, ROWS):
            t = first + tl.arange(0, ROWS)
            r, live = b * T + t, t < end
            rstd = tl.load(rstds + r, live, other=0)[:, None]
            mean = tl.load(means + r, live, other=0)[:, None]
            g = load_rows(dy, r, d, live, D)
            n = load_rows(kept, r, d, live, D)
            if weight is not None:
                n = (n + bt * load_rows(f, r, d, live, D) + shift) * rstd
                g *= w
            dz = rstd * (g - n * mean)
            store_rows(dx, r, d, dz - to_dx, live, D)
            store_rows(df, r, d, bt * dz - to_df, live, D)
