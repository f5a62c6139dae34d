"""MV-Split residual with RMSNorm (arXiv 2605.06169), J the token mean of a segment, P = I - J.

    z = x + beta * P f + alpha * J (f - x)      y = z * rstd * weight
      = x + beta * (f - jf) + shift             shift = alpha * (jf - jx)

With dz and n as in _merge.py, and jdz = J dz:

    dx = dz - alpha * jdz      dalpha = sum_{b,s} Ts * jdz * (jf - jx)
    df = beta * dz + (alpha - beta) * jdz      dbeta = sum dz * (f - jf)

z and dbeta need centred f: if the mean dominates, beta * f - beta * jf has only rounding errors.

Bytes, in passes: at least 3 forward and 5 backward. These kernels, in two sweeps:

    forward   _means 2 read (1 if jx is an input), _apply 2 read and 1 written
    backward  _bwd_reduce 3 read, _bwd_means only partial rows, _bwd_apply 2 read and 2 written
              (_bwd_apply 3 read with a weight: n is computed from x and f)

The second sweep goes from the last sample to the first, because L2 still holds the last ones from
the first sweep.

Launch: _apply and _bwd_reduce by rows as in _merge.py, the others by columns; a program works
on one segment. Preconditions: contiguous tensors; the launchers copy others.
Deterministic: partial rows are added in a fixed order, without float atomics.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit_ops._host import (
    ceil_div,
    count_blocks,
    new_empty,
    new_statistics,
    next_power_of_two,
    require_merge,
    to_contiguous,
)
from mvsplit_ops.triton_kernels._common import (
    PLAIN_TILES,
    column_sum,
    find_missing,
    launch,
    mean_of,
    wide,
)
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
from mvsplit_ops.triton_kernels._segments import (
    add_up_last,
    block_tokens,
    encode_ends,
    segment_tokens,
)

__all__ = ["find_missing", "mvsplit_rmsnorm_bwd", "mvsplit_rmsnorm_fwd"]

# Each program owns columns, so sums over tokens need no exchange between programs. 64 columns are
# 128 bytes of bf16, a whole line; 32 pairs of rows are four 16-byte loads of x and of f.
MEANS = {"PAIRS": 32, "COLUMNS": 64, "num_warps": 4}
# _bwd_apply reads the means of the rows, so its tiles need not span D. 128 columns are 16 lanes of
# 16 bytes; with 64 rows of a program, its three vectors are less than 1/10 pass.
APPLY = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}
APPLY_ROWS = 64
# Partial rows and parameter gradients: 32 columns of fp32, 128 bytes, 32 rows at a time.
REDUCE = {"ROWS": 32, "COLUMNS": 32, "num_warps": 4}
MOST_CARRIED = 32  # column sums of y of a segment, which its last block adds up


def mvsplit_rmsnorm_fwd(
    x: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    jx: Tensor | None,
    segments: Sequence[int],
    eps: float,
    carry: bool,
) -> tuple[Tensor, ...]:
    B, T, D = x.shape
    S, ends = len(segments), encode_ends(segments)
    x, f, alpha, beta = to_contiguous(x, f, alpha, beta)
    weight, input_jx = to_contiguous(weight, jx)
    y, rstd = new_empty(x, x.shape), new_statistics(x, B, T)
    new_jx = new_statistics(x, *(0,) if input_jx is not None else (B, S, D))
    jf, shift = (new_statistics(x, B, S, D) for _ in range(2))
    share = rows_per_program(B * T)
    jy, partials, tickets = new_statistics(x, 0), None, None
    if carry:
        share = max(share, ceil_div(max(segments), MOST_CARRIED))
        jy, partials = (new_statistics(x, B, n, D) for n in (S, count_blocks(segments, share)))
        tickets = new_empty(x, (B, S), torch.int32)
    count = count_blocks(segments, share)
    programs = B * S * ceil_div(D, MEANS["COLUMNS"])
    means = x, f, alpha, input_jx, new_jx, jf, shift, tickets
    launch(_means, programs, x, *means, ends, T, D=D, **MEANS)
    tensors = x, f, beta, (jf, shift), weight, y, rstd, (partials, tickets, jy)
    launch(_apply, B * count, x, *tensors, ends, T, share, count, EPS=eps, **choose_tile(D))
    return y, jy, rstd, new_jx, jf


def mvsplit_rmsnorm_bwd(
    dy: Tensor,
    saved: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    jx: Tensor,
    jf: Tensor,
    segments: Sequence[int],
) -> tuple[Tensor, ...]:
    B, T, D = dy.shape
    S, ends = len(segments), encode_ends(segments)
    require_merge(dy, saved, f, (alpha, beta, weight), rstd, (jx, jf), segments)
    dy, saved, f, rstd, jx, jf = to_contiguous(dy, saved, f, rstd, jx, jf)
    (alpha, beta), (weight,) = to_contiguous(alpha, beta), to_contiguous(weight)
    params = 2 if weight is None else 3
    tile = choose_tile(D, "plain" if weight is None else "weighted backward")
    share = summed_rows_per_program(B * T, tile)
    count = count_blocks(segments, share)
    partials, parts = (new_statistics(dy, params, n, D) for n in (B * count, B * S))
    mean, jdz = new_statistics(dy, B, T), new_statistics(dy, B, S, D)
    dx, df = new_empty(dy, dy.shape), new_empty(dy, dy.shape)
    dparams = [new_statistics(dy, D) for _ in range(params)]
    tensors = dy, saved, f, (alpha, beta, weight), (rstd, jx, jf, mean)
    launch(_bwd_reduce, B * count, dy, *tensors, partials, ends, T, share, count, **tile)
    programs = B * S * ceil_div(D, REDUCE["COLUMNS"])
    means = partials, jx, jf, jdz, parts
    launch(_bwd_means, programs, dy, *means, ends, B, share, count, D=D, PARAMS=params, **REDUCE)
    columns = min(APPLY["COLUMNS"], next_power_of_two(D))
    count, tile = count_blocks(segments, APPLY_ROWS), {**APPLY, "COLUMNS": columns}
    programs = ceil_div(D, columns) * (1 + B * count)
    others = jdz, parts, (dx, df, tuple(dparams)), ends, B, T, APPLY_ROWS, count
    launch(_bwd_apply, programs, dy, *tensors, *others, D=D, **tile)
    return dx, df, *dparams, *([] if weight is not None else [new_statistics(dy, 0)])


@triton.jit(do_not_specialize=["T"])
def _means(
    x,
    f,
    alpha,
    input_jx,
    jxs,
    jfs,
    shifts,
    tickets,
    ends,
    T,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    slices = tl.cdiv(D, COLUMNS)
    unit, part = tl.program_id(0) // slices, tl.program_id(0) % slices
    b, segment = unit // len(ends), unit % len(ends)
    begin, end, _, _ = segment_tokens(segment, ends, 1)
    d = part * COLUMNS + tl.arange(0, COLUMNS)
    total_x, total_f = tl.zeros((COLUMNS,), tl.float64), tl.zeros((COLUMNS,), tl.float64)
    for block in range(begin, end, 2 * PAIRS * PLAIN_TILES):
        sum_x = tl.zeros((PAIRS, COLUMNS), jfs.dtype.element_ty)
        sum_f = sum_x
        for first in range(block, min(block + 2 * PAIRS * PLAIN_TILES, end), 2 * PAIRS):
            t = first + 2 * tl.arange(0, PAIRS)
            r, odd = b.to(tl.int64) * T + t, t + 1 < end
            sum_f += load_rows(f, r, d, t < end, D) + load_rows(f, r + 1, d, odd, D)
            if input_jx is None:
                sum_x += load_rows(x, r, d, t < end, D) + load_rows(x, r + 1, d, odd, D)
        total_f += tl.sum(sum_f, 0)
        if input_jx is None:
            total_x += tl.sum(sum_x, 0)
    at = unit.to(tl.int64) * D + d
    jf = mean_of(total_f, end - begin).to(jfs.dtype.element_ty)
    if input_jx is None:
        jx = mean_of(total_x, end - begin).to(jfs.dtype.element_ty)
        tl.store(jxs + at, jx, d < D)
    else:
        jx = tl.load(input_jx + at, d < D, other=0)
    tl.store(jfs + at, jf, d < D)
    tl.store(shifts + at, load_vector(alpha, d, D) * (jf - jx), d < D)
    if tickets is not None and part == 0:
        tl.store(tickets + unit, 0)


@triton.jit(do_not_specialize=["T", "share", "count"])
def _apply(
    x,
    f,
    beta,
    means,
    weight,
    y,
    rstds,
    carry,
    ends,
    T,
    share,
    count,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EPS: tl.constexpr,
):
    jfs, shifts = means
    partials, tickets, jys = carry
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    b, block = pid // count, pid % count
    segment, begin, end = block_tokens(block, ends, share)
    unit = b * len(ends) + segment
    d = tl.arange(0, BLOCK_D)
    bt = load_vector(beta, d, D)[None, :]
    jf = load_vector(jfs + unit.to(tl.int64) * D, d, D)[None, :]
    shift = load_vector(shifts + unit.to(tl.int64) * D, d, D)[None, :]
    if weight is not None:
        w = load_vector(weight, d, D)[None, :]
    total = tl.zeros((BLOCK_D,), tl.float64)
    for part in range(begin, end, ROWS * PLAIN_TILES):
        sum_y = tl.zeros((BLOCK_D,), rstds.dtype.element_ty)
        for first in range(part, min(part + ROWS * PLAIN_TILES, end), ROWS):
            t = tile_rows(first, ROWS)
            r, live = b.to(tl.int64) * T + t, t < end
            z = load_rows(x, r, d, live, D) + bt * (load_rows(f, r, d, live, D) - jf) + shift
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
            total += sum_y
    if partials is not None:
        tl.store(partials + pid.to(tl.int64) * D + d, total, d < D)
        add_up_last(partials, tickets, jys, unit, b * count, segment, ends, share, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "share", "count"])
def _bwd_reduce(
    dy,
    saved,
    f,
    parameters,
    statistics,
    partials,
    ends,
    T,
    share,
    count,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store mean_d(g * n) of each row, and partial rows of dz, dz * (f - jf) and dy * n."""
    alpha, beta, weight = parameters
    rstds, jxs, jfs, means = statistics
    pid = tl.program_id(0)
    b, block = pid // count, pid % count
    segment, begin, end = block_tokens(block, ends, share)
    at = (b * len(ends) + segment).to(tl.int64) * D
    d = tl.arange(0, BLOCK_D)
    jf = load_vector(jfs + at, d, D)
    if weight is not None:
        w, bt = load_vector(weight, d, D)[None, :], load_vector(beta, d, D)[None, :]
        shift = (load_vector(alpha, d, D) * (jf - load_vector(jxs + at, d, D)))[None, :]
    partials += pid.to(tl.int64) * D + d
    next_sum = tl.num_programs(0).to(tl.int64) * D
    for part in range(begin, end, ROWS * BLOCK_TILES):
        sum_dz = tl.zeros((BLOCK_D,), rstds.dtype.element_ty)
        sum_dzf, sum_dyn = sum_dz, sum_dz
        for first in range(part, min(part + ROWS * BLOCK_TILES, end), ROWS):
            t = tile_rows(first, ROWS)
            r, live = b.to(tl.int64) * T + t, t < end
            rstd = tl.load(rstds + r, live, other=0)[:, None]
            g = load_rows(dy, r, d, live, D)
            n = load_rows(saved, r, d, live, D)
            centred = load_rows(f, r, d, live, D) - jf[None, :]
            if weight is not None:  # saved is x
                n = (n + bt * centred + shift) * rstd
                sum_dyn += tl.sum(g * n, 0)
                g *= w
            mean = mean_d(g * n, D)
            dz = rstd * (g - n * mean[:, None])
            sum_dz += tl.sum(dz, 0)
            sum_dzf += tl.sum(dz * centred, 0)
            tl.store(means + r, mean, live)
        add_block(partials, sum_dz, d < D, part > begin)
        add_block(partials + next_sum, sum_dzf, d < D, part > begin)
        if weight is not None:
            add_block(partials + 2 * next_sum, sum_dyn, d < D, part > begin)


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
    """Store jdz of a segment, and its part of dalpha, dbeta and dweight."""
    slices = tl.cdiv(D, COLUMNS)
    unit = tl.program_id(0) // slices
    b, segment = unit // len(ends), unit % len(ends)
    begin, end, first, total = segment_tokens(segment, ends, share)
    d = (tl.program_id(0) % slices) * COLUMNS + tl.arange(0, COLUMNS)
    at = unit.to(tl.int64) * D + d
    rows = partials + (b * count + first).to(tl.int64) * D
    sum_dz = column_sum(rows, total, d, D, ROWS)
    difference = tl.load(jfs + at, d < D, other=0) - tl.load(jxs + at, d < D, other=0)
    tl.store(jdzs + at, mean_of(sum_dz, end - begin), d < D)
    tl.store(parts + at, sum_dz * difference, d < D)
    row, part = (B * count).to(tl.int64) * D, (B * len(ends)).to(tl.int64) * D
    for i in tl.static_range(1, PARAMS):
        tl.store(parts + i * part + at, column_sum(rows + i * row, total, d, D, ROWS), d < D)


@triton.jit(do_not_specialize=["B", "T", "share", "count"])
def _bwd_apply(
    dy,
    saved,
    f,
    parameters,
    statistics,
    jdzs,
    parts,
    gradients,
    ends,
    B,
    T,
    share,
    count,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store dx and df; the first programs add up the gradients of the parameters instead."""
    alpha, beta, weight = parameters
    rstds, jxs, jfs, means = statistics
    dx, df, dparams = gradients
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
        a, bt = load_vector(alpha, d, D)[None, :], load_vector(beta, d, D)[None, :]
        jdz = load_vector(jdzs + at, d, D)[None, :]
        to_dx = a * jdz
        to_df = bt * jdz - to_dx  # the negative of what is added
        if weight is not None:
            w = load_vector(weight, d, D)[None, :]
            jf = load_vector(jfs + at, d, D)[None, :]
            shift = a * (jf - load_vector(jxs + at, d, D)[None, :])
        for first in range(begin, end, ROWS):
            t = first + tl.arange(0, ROWS)
            r, live = b.to(tl.int64) * T + t, t < end
            rstd = tl.load(rstds + r, live, other=0)[:, None]
            mean = tl.load(means + r, live, other=0)[:, None]
            g = load_rows(dy, r, d, live, D)
            n = load_rows(saved, r, d, live, D)
            if weight is not None:
                n = (n + bt * (load_rows(f, r, d, live, D) - jf) + shift) * rstd
                g *= w
            dz = rstd * (g - n * mean)
            store_rows(dx, r, d, dz - to_dx, live, D)
            store_rows(df, r, d, bt * dz - to_df, live, D)
