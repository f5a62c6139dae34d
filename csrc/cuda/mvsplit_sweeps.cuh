// MV-Split in two sweeps over the rows, for long segments and for GPUs without clusters.
//
// Bytes, in passes of (B, T, D): forward 5 (sweep_means reads x and f, or only f if jx is an input;
// sweep_apply 2 read and 1 written), backward 7 (sweep_reduce 3 read; sweep_gradients 2 read and 2
// written) or 8 with a weight (sweep_gradients 3 read).
// Launch: sweep_means has a block per 8 vectors of columns of a segment; sweep_apply, sweep_reduce
// and sweep_gradients have blocks of at most `share` rows of one segment, `blocks` per sample
// (rows.cuh); sweep_units has a block per 32 columns of a segment. Shared memory: sweep_means
// 2 * 256 * VEC of Total, sweep_units 256 A, the others as in rows.cuh. Preconditions: as in rows.cuh; LONG if
// a segment has more than 32 * RUN rows; blocks that sum rows have few (rows_per_block).
// Deterministic: rows of a block and partial rows are added in a fixed order.
#pragma once
#define SHIFT 1
#include <rows.cuh>

struct Args {
    global<T> x, f, dy, y, df;  // backward: x is the saved tensor, x or y; y is dx
    global<A> rstd, jx, jf;
    global<A> input_jx, jy;     // forward: jx if it is an input; means of y if CARRY
    global<A> shift, jdz;       // (B, S, D), forward and backward
    global<A> mean;             // (B, T): mean_d(g * n)
    global<A> partials, parts;  // (2 or 3, B * blocks, D), (2 or 3, B * S, D)
    Parameter alpha, beta, weight;
    i64 B, tokens, D, S;
    i64 share, blocks;
    double eps;
    Segment segments[MOST_SEGMENTS];
};

struct Block {
    i64 b, unit, begin, end;  // rows of N = B * T
};

// Return the rows of this block. A segment has ceil(rows / share) blocks, so no block spans two.
DEVICE Block block_at(const Args& args) {
    i64 b = ctaid() / args.blocks, block = ctaid() % args.blocks;
    for (int s = 0;; ++s) {
        Segment segment = args.segments[s];
        i64 count = ceil_div<i64>(segment.end - segment.begin, args.share);
        if (block < count || s == args.S - 1) {
            i64 begin = segment.begin + block * args.share, end = begin + args.share;
            if (end > segment.end) end = segment.end;
            return {b, b * args.S + segment.index, b * args.tokens + begin, b * args.tokens + end};
        }
        block -= count;
    }
}

DEVICE void stage_vector(global<A> from, A* to, int D) {
    for (int d = tid(); d < D; d += THREADS) to[d] = load_one(from + d);
}

DEVICE void stage_shift(const Args& args, i64 unit, A* to, int D) {
    for (int d = tid(); d < D; d += THREADS) {
        A alpha[1], beta[1];
        load_parameter<1>(args.alpha, d, true, alpha);
        load_parameter<1>(args.beta, d, true, beta);
        A jx = load_one(args.jx + unit * D + d), jf = load_one(args.jf + unit * D + d);
        to[d] = shift_of(alpha[0], beta[0], jx, jf);
    }
}

// Add the partial rows of the blocks of a segment: forward (CARRY) gives the mean of y, backward
// gives jdz and the part of the segment in the gradients of the parameters.
KERNEL(sweep_units, Args, 256, 4) {
    constexpr int COLUMNS = 32, ROWS_AT_ONCE = 256 / COLUMNS;
    i64 slices = ceil_div<i64>(args.D, COLUMNS);
    i64 pair = ctaid() / slices, b = pair / args.S;  // (sample, segment)
    i64 first = b * args.blocks;
    for (int s = 0; s < pair % args.S; ++s)
        first += ceil_div<i64>(args.segments[s].end - args.segments[s].begin, args.share);
    Segment segment = args.segments[pair % args.S];
    A Ts = segment.end - segment.begin;
    i64 count = ceil_div<i64>(segment.end - segment.begin, args.share);
    i64 d = ctaid() % slices * COLUMNS + tid() % COLUMNS;
    i64 unit = b * args.S + segment.index, offset = unit * args.D + d;
    A* parts = (A*)dynamic_shared();
    int planes = args.jy ? 1 : WEIGHT ? 3 : 2;
    for (int plane = 0; plane < planes; ++plane) {
        global<A> rows = args.partials + (plane * args.B * args.blocks + first) * args.D + d;
        i64 first_row = tid() / COLUMNS, own = ceil_div<i64>(count - first_row, ROWS_AT_ONCE);
        A sum = 0;
        if (d < args.D) sum = sum_strided(rows + first_row * args.D, own, ROWS_AT_ONCE * args.D);
        barrier_sync();
        parts[tid()] = sum;
        barrier_sync();
        if (tid() >= COLUMNS || d >= args.D) continue;
        for (int g = 1; g < ROWS_AT_ONCE; ++g) sum += parts[g * COLUMNS + tid()];
        if (args.jy) {
            store_one(args.jy + offset, sum / Ts);
            continue;
        }
        global<A> part = args.parts + plane * args.B * args.S * args.D + offset;
        if (plane == 0) {
            store_one(args.jdz + offset, sum / Ts);
            sum *= load_one(args.jf + offset) - load_one(args.jx + offset);
        }
        store_one(part, sum);
    }
}

#if !BACKWARD
KERNEL(sweep_means, Args, 256, 3) {
    constexpr int COLUMN_LANES = 8, ROWS_AT_ONCE = 256 / COLUMN_LANES;
    i64 slices = ceil_div<i64>(args.D, COLUMN_LANES * VEC);
    i64 pair = ctaid() / slices, b = pair / args.S;  // (sample, segment)
    Segment segment = args.segments[pair % args.S];
    int column_lane = tid() % COLUMN_LANES, row_group = tid() / COLUMN_LANES;
    i64 d = (ctaid() % slices * COLUMN_LANES + column_lane) * VEC;
    bool live = d < args.D;
    Total sum_x[VEC] = {}, sum_f[VEC] = {};
    if (live)
#pragma unroll 2
        for (i64 t = segment.begin + row_group; t < segment.end; t += ROWS_AT_ONCE) {
            i64 offset = (b * args.tokens + t) * args.D + d;
            A x[VEC] = {}, f[VEC];
            if (!args.input_jx) widen<T, VEC>(load<VEC>(args.x + offset), x);
            widen<T, VEC>(load<VEC>(args.f + offset), f);
#pragma unroll
            for (int j = 0; j < VEC; ++j) sum_x[j] += x[j], sum_f[j] += f[j];
        }
    Total(*parts)[256][VEC] = (Total(*)[256][VEC])dynamic_shared();
#pragma unroll
    for (int j = 0; j < VEC; ++j) parts[0][tid()][j] = sum_x[j], parts[1][tid()][j] = sum_f[j];
    barrier_sync();
    // Half of the groups remain after each step: the sum of equal parts is exact.
    for (int half = ROWS_AT_ONCE / 2; half; half /= 2) {
        if (row_group < half)
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                parts[0][tid()][j] += parts[0][tid() + half * COLUMN_LANES][j];
                parts[1][tid()][j] += parts[1][tid() + half * COLUMN_LANES][j];
            }
        barrier_sync();
    }
    if (row_group || !live) return;
    i64 offset = (b * args.S + segment.index) * args.D + d;
    A alpha[VEC], beta[VEC], jx[VEC], jf[VEC], shift[VEC];
    Total Ts = segment.end - segment.begin;
    load_parameter<VEC>(args.alpha, d, true, alpha);
    load_parameter<VEC>(args.beta, d, true, beta);
    if (args.input_jx) widen<A, VEC>(load<VEC>(args.input_jx + offset), jx);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        if (!args.input_jx) jx[j] = (A)(parts[0][tid()][j] / Ts);
        jf[j] = (A)(parts[1][tid()][j] / Ts);
        shift[j] = shift_of(alpha[j], beta[j], jx[j], jf[j]);
    }
    if (!args.input_jx) store(args.jx + offset, narrow<A>(jx));
    store(args.jf + offset, narrow<A>(jf));
    store(args.shift + offset, narrow<A>(shift));
}

KERNEL(sweep_apply, Args, THREADS, RESIDENT) {
    int D = (int)args.D;
    Block block = block_at(args);
    Shared shared(D);
    A *beta = shared.allocate(), *jf = shared.allocate(CENTRED), *shift = shared.allocate();
    A* weight = shared.allocate(WEIGHT);
    stage(args.beta, beta, D);
    if (WEIGHT) stage(args.weight, weight, D);
    if (CENTRED) stage_vector(args.jf + block.unit * D, jf, D);
    stage_vector(args.shift + block.unit * D, shift, D);
    barrier_sync();
    ForwardOperands operands = {args.x, args.f, args.y,         args.rstd, beta,       jf,
                                shift,  weight, shared.scratch, D,         (A)args.eps};
    A jy[ITEMS][VEC] = {};
    forward_rows<CARRY>(operands, block.begin, block.end, jy);
    if (CARRY) store_columns(jy, shared.next, D, args.partials + (i64)ctaid() * D);
}

#else
KERNEL(sweep_reduce, Args, THREADS, RESIDENT) {
    int D = (int)args.D, turn = 0;
    Block block = block_at(args);
    Shared shared(D);
    A *jf = shared.allocate(), *beta = shared.allocate(BRANCH), *shift = shared.allocate(BRANCH);
    A* weight = shared.allocate(WEIGHT);
    stage_vector(args.jf + block.unit * D, jf, D);
    if (BRANCH) stage(args.beta, beta, D);
    if (BRANCH) stage_shift(args, block.unit, shift, D);
    if (WEIGHT) stage(args.weight, weight, D);
    barrier_sync();
    BackwardOperands operands = {args.dy, args.x, args.f, args.rstd,      beta,
                                 jf,      shift,  weight, shared.scratch, D};
    A sum_dz[ITEMS][VEC] = {}, sum_dzf[ITEMS][VEC] = {}, dweight[ITEMS][VEC] = {};
    for (GroupRows<true> rows(block.begin, block.end); rows.left(); rows.advance()) {
        i64 r = rows.next;
        bool live = r < rows.end;
        Row f;
        A dz[ITEMS][VEC];
        A mean = backward_row(operands, r, live, turn, f, dz, dweight);
        if (live && lane() == 0) store_one(args.mean + r, mean);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            A branch[VEC], centre[VEC];
            widen<T, VEC>(f.vectors[i], branch);
            read(jf, i, D, centre);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {  // dz is zero beyond the end of the row
                sum_dz[i][j] += dz[i][j];
                sum_dzf[i][j] += dz[i][j] * (branch[j] - centre[j]);
            }
        }
    }
    global<A> partial = args.partials + (i64)ctaid() * D;
    i64 plane = args.B * args.blocks * D;
    store_columns(sum_dz, shared.next, D, partial);
    store_columns(sum_dzf, shared.next, D, partial + plane);
    if (WEIGHT) store_columns(dweight, shared.next, D, partial + 2 * plane);
}

KERNEL(sweep_gradients, Args, THREADS, RESIDENT) {
    int D = (int)args.D;
    Block block = block_at(args);
    Shared shared(D);
    A *beta = shared.allocate(), *jdz = shared.allocate(), *mean_part = shared.allocate();
    A *shift = shared.allocate(BRANCH), *weight = shared.allocate(WEIGHT);
    stage(args.beta, beta, D);
    stage(args.alpha, mean_part, D);
    stage_vector(args.jdz + block.unit * D, jdz, D);
    if (WEIGHT) stage(args.weight, weight, D);
    if (BRANCH) stage_shift(args, block.unit, shift, D);
    barrier_sync();
    for (int d = tid(); d < D; d += THREADS) mean_part[d] *= jdz[d];  // alpha * jdz
    barrier_sync();
    global<A> jf = args.jf + block.unit * D;
    for (i64 r = block.begin + group(); r < block.end; r += GROUPS) {
        Row dy, x, f;
        load_row(args.dy + r * D, true, D, dy);
        load_row(args.x + r * D, true, D, x);
        if (BRANCH) load_row(args.f + r * D, true, D, f);
        A rstd = load_one(args.rstd + r), mean = load_one(args.mean + r);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            A dz[VEC], n[VEC], b[VEC], centre[VEC], add[VEC];
            widen<T, VEC>(dy.vectors[i], dz);
            if (BRANCH)
                merge(x, f, beta, jf, shift, i, D, n);
            else
                widen<T, VEC>(x.vectors[i], n);
            if (WEIGHT) read(weight, i, D, b);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                if (BRANCH) n[j] *= rstd;
                if (WEIGHT) dz[j] *= b[j];
                dz[j] = rstd * (dz[j] - n[j] * mean);
            }
            read(mean_part, i, D, add);
#pragma unroll
            for (int j = 0; j < VEC; ++j) n[j] = dz[j] - add[j];
            store_vector(args.y + r * D, i, true, D, n);
            read(beta, i, D, b);
            read(jdz, i, D, centre);
#pragma unroll
            for (int j = 0; j < VEC; ++j) n[j] = b[j] * (dz[j] - centre[j]) + add[j];
            store_vector(args.df + r * D, i, true, D, n);
        }
    }
}
#endif
