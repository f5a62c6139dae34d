// MV-Split with one thread-block cluster per (sample, segment). The blocks split D, and each keeps
// its columns of every tensor in shared memory. Sums over tokens are therefore local to a block;
// the blocks exchange only one scalar per row: sum z^2 forward, sum g * n backward.
//
// Bytes, in passes of (B, T, D): forward 2 read and 1 written, backward 3 and 2. In addition, once
// per cluster, the means, the gains and rstd, and one partial row of the gradient of each gain,
// which sum_rows adds.
// Launch: B * S clusters, the longest segment first; block `rank` has the columns from rank * slice
// to (rank + 1) * slice. LANES threads share a row, with ITEMS vectors each, and a block processes
// THREADS / LANES rows at the same time. Shared memory (Layout): `tensors` slices of `rows` rows,
// two or three A per row, and the column sums of each warp. If a vector is 16 bytes, the copies of
// all rows are in flight at once, and each CHUNKS-th of the rows has an mbarrier; rows are copied in
// bulk, or 16 bytes per thread if they are too short for that. Otherwise plain loads are used.
// Preconditions: VEC divides D and slice; LANES * ITEMS * VEC >= slice; the number of blocks is a
// power of two and at most 16; pointers aligned to a vector; sm_90 or newer.
// Deterministic: sums over rows, over the blocks of a cluster and over clusters have a fixed order.
#pragma once
#include <cluster.cuh>

#if !BACKWARD
KERNEL(cluster_fwd, Args, THREADS, THREADS > 256 || LONG ? 1 : ITEMS == 1 && !WEIGHT ? 3 : 2) {
    Tile tile(args);
    Layout layout(args);
    global<T> tensors[2] = {args.x, args.f};
    fetch(args, tile, layout, tensors);
    T *xs = layout.tensor_rows(0), *fs = layout.tensor_rows(1);
    A *sums = layout.statistics(0, 2), *rstds = layout.statistics(1, 2),
      *columns = layout.columns(2);

    A alpha[ITEMS][VEC], beta[ITEMS][VEC], weight[ITEMS][VEC], input_jx[ITEMS][VEC];
    stage(args.alpha, tile, columns, layout.slice, 0);
    stage(args.beta, tile, columns, layout.slice, 1);
    if (WEIGHT) stage(args.weight, tile, columns, layout.slice, 2);
    if (args.input_jx) stage(args.input_jx, args, tile, columns, layout.slice, 3);
    barrier_sync();
    load_staged(alpha, columns, layout.slice, 0);
    load_staged(beta, columns, layout.slice, 1);
    if (WEIGHT) load_staged(weight, columns, layout.slice, 2);
    if (args.input_jx) load_staged(input_jx, columns, layout.slice, 3);

    Total sum_x[ITEMS][VEC] = {}, sum_f[ITEMS][VEC] = {};
    Arrivals arrivals(tile, layout);
    for (int first = 0; first < tile.rows; first += GROUPS) {
        int row = first + group();
        arrivals.await(first);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (row >= tile.rows || column(i) >= tile.width) continue;
            A x[VEC], f[VEC];
            read(xs, layout.slice, row, i, x);
            read(fs, layout.slice, row, i, f);
#pragma unroll
            for (int j = 0; j < VEC; ++j) sum_x[i][j] += x[j], sum_f[i][j] += f[j];
        }
    }
    sum_columns(sum_f, columns, layout.slice);
    if (!args.input_jx) sum_columns(sum_x, columns, layout.slice);

    A jx[ITEMS][VEC], jf[ITEMS][VEC], shift[ITEMS][VEC];
    Total per_token = (Total)1 / tile.Ts;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            jf[i][j] = (A)(sum_f[i][j] * per_token);
            jx[i][j] = args.input_jx ? input_jx[i][j] : (A)(sum_x[i][j] * per_token);
            shift[i][j] = shift_of(alpha[i][j], beta[i][j], jx[i][j], jf[i][j]);
        }
    // Compute z of one vector of a row.
    auto merge = [&](int row, int i, A(&z)[VEC]) {
        A f[VEC];
        read(xs, layout.slice, row, i, z);
        read(fs, layout.slice, row, i, f);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            if (CENTRED) f[j] -= jf[i][j];
            z[j] = merged(z[j], beta[i][j], f[j], shift[i][j]);
        }
    };
    for (int first = 0; first < tile.rows; first += GROUPS) {
        int row = first + group();
        A squares = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (row >= tile.rows || column(i) >= tile.width) continue;
            A z[VEC];
            merge(row, i, z);
#pragma unroll
            for (int j = 0; j < VEC; ++j) squares += z[j] * z[j];
        }
        squares = sum_lanes<LANES>(squares);
        if (lane() == 0 && row < tile.rows) sums[row] = squares;
    }
    A per_column = (A)1 / (A)args.D;
    reduce_rows(tile, sums, rstds,
                [&](A sum) { return reciprocal_root(sum * per_column + (A)args.eps); });

    i64 unit = tile.unit * args.D;
    write_columns(args.jf + unit, tile, jf);
    if (!args.input_jx) write_columns(args.jx + unit, tile, jx);
    for (int i = tid(); i < tile.rows_per_rank(); i += THREADS) {
        int row = tile.rank * tile.rows_per_rank() + i;
        if (row < tile.rows) store_one(args.rstd + tile.row0 + row, rstds[row]);
    }
    Total sum_y[ITEMS][VEC] = {};
    for (int row = group(); row < tile.rows; row += GROUPS) {
        A rstd = rstds[row];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (column(i) >= tile.width) continue;
            A z[VEC];
            merge(row, i, z);
#pragma unroll
            for (int j = 0; j < VEC; ++j) z[j] *= WEIGHT ? rstd * weight[i][j] : rstd;
            vec<T, VEC> y = narrow<T>(z);
            store(args.y + tile.row_offset(row, args.D) + column(i), y);
            if (!CARRY) continue;
            widen<T, VEC>(y, z);
#pragma unroll
            for (int j = 0; j < VEC; ++j) sum_y[i][j] += z[j];
        }
    }
    if (!CARRY) return;
    sum_columns(sum_y, columns, layout.slice);
    A jy[ITEMS][VEC];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j) jy[i][j] = (A)(sum_y[i][j] * per_token);
    write_columns(args.jy + unit, tile, jy);
}

#else
KERNEL(cluster_bwd, Args, THREADS, THREADS > 256 || LONG ? 1 : 2) {
    Tile tile(args);
    Layout layout(args);
    global<T> tensors[3] = {args.dy, args.x, args.f};
    fetch(args, tile, layout, tensors);
    T *dys = layout.tensor_rows(0), *saved = layout.tensor_rows(1), *fs = layout.tensor_rows(2);
    A *sums = layout.statistics(0, 3), *means = layout.statistics(1, 3),
      *rstds = layout.statistics(2, 3);
    A* columns = layout.columns(3);
    for (int row = tid(); row < tile.rows; row += THREADS)
        rstds[row] = load_one(args.rstd + tile.row0 + row);

    A alpha[ITEMS][VEC], beta[ITEMS][VEC], jx[ITEMS][VEC], jf[ITEMS][VEC], weight[ITEMS][VEC];
    stage(args.alpha, tile, columns, layout.slice, 0);
    stage(args.beta, tile, columns, layout.slice, 1);
    stage(args.jx, args, tile, columns, layout.slice, 2);
    stage(args.jf, args, tile, columns, layout.slice, 3);
    if (WEIGHT) stage(args.weight, tile, columns, layout.slice, 4);
    barrier_sync();
    load_staged(alpha, columns, layout.slice, 0);
    load_staged(beta, columns, layout.slice, 1);
    load_staged(jx, columns, layout.slice, 2);
    load_staged(jf, columns, layout.slice, 3);
    if (WEIGHT) load_staged(weight, columns, layout.slice, 4);

    // Compute g (before the weight), n and f, if CENTRED minus jf, of one vector of a row.
    auto gradient = [&](int row, int i, A(&g)[VEC], A(&n)[VEC], A(&f)[VEC]) {
        read(dys, layout.slice, row, i, g);
        read(saved, layout.slice, row, i, n);
        read(fs, layout.slice, row, i, f);
#pragma unroll
        for (int j = 0; CENTRED && j < VEC; ++j) f[j] -= jf[i][j];
        if (!WEIGHT) return;
        A rstd = rstds[row];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            A shift = shift_of(alpha[i][j], beta[i][j], jx[i][j], jf[i][j]);
            n[j] = merged(n[j], beta[i][j], f[j], shift) * rstd;
        }
    };
    Total sum_dz[ITEMS][VEC] = {}, sum_dzf[ITEMS][VEC] = {}, sum_dyn[ITEMS][VEC] = {};
    Arrivals arrivals(tile, layout);
    for (int first = 0; first < tile.rows; first += GROUPS) {
        int row = first + group();
        bool live = row < tile.rows;
        arrivals.await(first);
        A product = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (!live || column(i) >= tile.width) continue;
            A g[VEC], n[VEC], f[VEC];
            gradient(row, i, g, n, f);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                if (WEIGHT) {
                    sum_dyn[i][j] += g[j] * n[j];
                    g[j] *= weight[i][j];
                }
                product += g[j] * n[j];
            }
        }
        product = sum_lanes<LANES>(product);
        if (lane() == 0 && live) sums[row] = product;
    }
    A per_column = (A)1 / (A)args.D;
    Total per_token = (Total)1 / tile.Ts;
    reduce_rows(tile, sums, means, [&](A sum) { return sum * per_column; });

    auto dz_of = [&](int row, int i, A(&dz)[VEC], A(&f)[VEC]) {
        A n[VEC], rstd = rstds[row], mean = means[row];
        gradient(row, i, dz, n, f);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            if (WEIGHT) dz[j] *= weight[i][j];
            dz[j] = rstd * (dz[j] - n[j] * mean);
        }
    };
    for (int row = group(); row < tile.rows; row += GROUPS) {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (column(i) >= tile.width) continue;
            A dz[VEC], f[VEC];
            dz_of(row, i, dz, f);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                sum_dz[i][j] += dz[j];
                sum_dzf[i][j] += dz[j] * (CENTRED ? f[j] : f[j] - jf[i][j]);
            }
        }
    }
    sum_columns(sum_dz, columns, layout.slice);
    sum_columns(sum_dzf, columns, layout.slice);
    if (WEIGHT) sum_columns(sum_dyn, columns, layout.slice);

    i64 plane = args.B * args.S * args.D;
    global<A> partial = args.partials + tile.unit * args.D;
    write_columns(partial + plane, tile, sum_dzf);
    if (WEIGHT) write_columns(partial + 2 * plane, tile, sum_dyn);
    A jdz[ITEMS][VEC], to_dx[ITEMS][VEC];  // not in alpha: with a weight, dz_of reads it again
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            jdz[i][j] = (A)(sum_dz[i][j] * per_token);
            to_dx[i][j] = alpha[i][j] * jdz[i][j];
            sum_dz[i][j] *= jf[i][j] - jx[i][j];  // the segment's part of dalpha
        }
    write_columns(partial, tile, sum_dz);

    for (int row = group(); row < tile.rows; row += GROUPS)
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (column(i) >= tile.width) continue;
            A dz[VEC], f[VEC], dx[VEC];
            dz_of(row, i, dz, f);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                dx[j] = dz[j] - to_dx[i][j];
                f[j] = beta[i][j] * (dz[j] - jdz[i][j]) + to_dx[i][j];  // df
            }
            i64 to = tile.row_offset(row, args.D) + column(i);
            store(args.y + to, narrow<T>(dx));
            store(args.df + to, narrow<T>(f));
        }
}
#endif
