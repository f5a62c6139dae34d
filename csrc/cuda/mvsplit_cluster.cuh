// MV-Split by clusters: one a (sample, segment), whose blocks split D and keep their columns of
// every tensor in shared memory. Sums over tokens are then local to a block; only a scalar a row
// crosses the cluster: sum z^2 forward, sum g * n backward.
//
// Bytes, in passes: forward 2 read and 1 written, backward 3 and 2; the means, the gains and rstd
// once a cluster; partial rows of the gains' gradients, one a cluster, which sum_rows adds.
// Launch: B * S clusters, the longest segment first; block `rank` has columns
// [rank * slice, (rank + 1) * slice). LANES threads own a row's ITEMS vectors each, THREADS / LANES
// rows at once. Shared memory (Layout): `tensors` slices of `rows` rows, two or three A a row, sums
// of columns of each warp. Where a vector is 16 bytes, all rows are in flight at once, with a
// barrier for each CHUNKS-th of them: in bulk copies of a row, or in 16 bytes a thread where rows
// are too short for those. Else by plain loads.
// Preconditions: VEC divides D and slice; LANES * ITEMS * VEC >= slice; at most 16 blocks, a power
// of two; pointers aligned to a vector; sm_90 or newer.
#pragma once
#include <cluster.cuh>

#if !BACKWARD
KERNEL(cluster_fwd, Args, THREADS, THREADS > 256 ? 1 : ITEMS == 1 && !WEIGHT ? 3 : 2) {
    Part part(args);
    Layout at(args);
    global<T> tensors[2] = {args.x, args.f};
    fetch(args, part, at, tensors);
    T *xs = at.rows_of(0), *fs = at.rows_of(1);
    A *sums = at.statistics(0, 2), *rstds = at.statistics(1, 2), *columns = at.columns(2);

    A alpha[ITEMS][VEC], beta[ITEMS][VEC], weight[ITEMS][VEC], given[ITEMS][VEC];
    put(args.alpha, part, columns, at.slice, 0);
    put(args.beta, part, columns, at.slice, 1);
    if (WEIGHT) put(args.weight, part, columns, at.slice, 2);
    if (args.given) put(args.given, args, part, columns, at.slice, 3);
    barrier_sync();
    take(alpha, columns, at.slice, 0);
    take(beta, columns, at.slice, 1);
    if (WEIGHT) take(weight, columns, at.slice, 2);
    if (args.given) take(given, columns, at.slice, 3);

    A jx[ITEMS][VEC] = {}, jf[ITEMS][VEC] = {};
    Arrivals arrivals(part, at);
    for (int first = 0; first < part.rows; first += GROUPS) {
        int row = first + group();
        arrivals.await(first);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (row >= part.rows || column(i) >= part.width) continue;
            A x[VEC], f[VEC];
            read(xs, at.slice, row, i, x);
            read(fs, at.slice, row, i, f);
#pragma unroll
            for (int j = 0; j < VEC; ++j) jx[i][j] += x[j], jf[i][j] += f[j];
        }
    }
    sum_columns(jf, columns, at.slice);
    if (!args.given) sum_columns(jx, columns, at.slice);

    A shift[ITEMS][VEC], a_token = (A)1 / part.Ts;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            jf[i][j] *= a_token;
            jx[i][j] = args.given ? given[i][j] : jx[i][j] * a_token;
            shift[i][j] = shift_of(alpha[i][j], beta[i][j], jx[i][j], jf[i][j]);
        }
    // z of this thread's vector of a row
    auto merge = [&](int row, int i, A(&z)[VEC]) {
        A f[VEC];
        read(xs, at.slice, row, i, z);
        read(fs, at.slice, row, i, f);
#pragma unroll
        for (int j = 0; j < VEC; ++j) z[j] += beta[i][j] * f[j] + shift[i][j];
    };
    for (int first = 0; first < part.rows; first += GROUPS) {
        int row = first + group();
        A squares = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (row >= part.rows || column(i) >= part.width) continue;
            A z[VEC];
            merge(row, i, z);
#pragma unroll
            for (int j = 0; j < VEC; ++j) squares += z[j] * z[j];
        }
        squares = sum_lanes<LANES>(squares);
        if (lane() == 0 && row < part.rows) sums[row] = squares;
    }
    A a_column = (A)1 / (A)args.D;
    share_rows(part, sums, rstds,
               [&](A sum) { return reciprocal_root(sum * a_column + (A)args.eps); });

    i64 unit = part.unit * args.D;
    write_columns(args.jf + unit, part, jf);
    if (!args.given) write_columns(args.jx + unit, part, jx);
    for (int i = tid(); i < part.rows_each(); i += THREADS) {
        int row = part.rank * part.rows_each() + i;
        if (row < part.rows) store_one(args.rstd + part.row0 + row, rstds[row]);
    }
    A jy[ITEMS][VEC] = {};
    for (int row = group(); row < part.rows; row += GROUPS) {
        A rstd = rstds[row];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (column(i) >= part.width) continue;
            A z[VEC];
            merge(row, i, z);
#pragma unroll
            for (int j = 0; j < VEC; ++j) z[j] *= WEIGHT ? rstd * weight[i][j] : rstd;
            vec<T, VEC> y = narrow<T>(z);
            store(args.y + part.row_of(row, args.D) + column(i), y);
            if (!CARRY) continue;
            widen<T, VEC>(y, z);
#pragma unroll
            for (int j = 0; j < VEC; ++j) jy[i][j] += z[j];
        }
    }
    if (!CARRY) return;
    sum_columns(jy, columns, at.slice);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j) jy[i][j] *= a_token;
    write_columns(args.jy + unit, part, jy);
}

#else
KERNEL(cluster_bwd, Args, THREADS, THREADS > 256 ? 1 : 2) {
    Part part(args);
    Layout at(args);
    global<T> tensors[3] = {args.dy, args.x, args.f};
    fetch(args, part, at, tensors);
    T *dys = at.rows_of(0), *kept = at.rows_of(1), *fs = at.rows_of(2);
    A *sums = at.statistics(0, 3), *means = at.statistics(1, 3), *rstds = at.statistics(2, 3);
    A* columns = at.columns(3);
    for (int row = tid(); row < part.rows; row += THREADS)
        rstds[row] = load_one(args.rstd + part.row0 + row);

    A alpha[ITEMS][VEC], beta[ITEMS][VEC], jx[ITEMS][VEC], jf[ITEMS][VEC], weight[ITEMS][VEC];
    put(args.alpha, part, columns, at.slice, 0);
    put(args.beta, part, columns, at.slice, 1);
    put(args.jx, args, part, columns, at.slice, 2);
    put(args.jf, args, part, columns, at.slice, 3);
    if (WEIGHT) put(args.weight, part, columns, at.slice, 4);
    barrier_sync();
    take(alpha, columns, at.slice, 0);
    take(beta, columns, at.slice, 1);
    take(jx, columns, at.slice, 2);
    take(jf, columns, at.slice, 3);
    if (WEIGHT) take(weight, columns, at.slice, 4);

    // g, n and f of this thread's vector of a row
    auto gradient = [&](int row, int i, A(&g)[VEC], A(&n)[VEC], A(&f)[VEC]) {
        read(dys, at.slice, row, i, g);
        read(kept, at.slice, row, i, n);
        read(fs, at.slice, row, i, f);
        if (!WEIGHT) return;
        A rstd = rstds[row];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            A shift = shift_of(alpha[i][j], beta[i][j], jx[i][j], jf[i][j]);
            n[j] = (n[j] + beta[i][j] * f[j] + shift) * rstd;
        }
    };
    A sum_dz[ITEMS][VEC] = {}, sum_dzf[ITEMS][VEC] = {}, sum_dyn[ITEMS][VEC] = {};
    Arrivals arrivals(part, at);
    for (int first = 0; first < part.rows; first += GROUPS) {
        int row = first + group();
        bool live = row < part.rows;
        arrivals.await(first);
        A product = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (!live || column(i) >= part.width) continue;
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
    A a_column = (A)1 / (A)args.D, a_token = (A)1 / part.Ts;
    share_rows(part, sums, means, [&](A sum) { return sum * a_column; });

    auto dz_of = [&](int row, int i, A(&dz)[VEC], A(&f)[VEC]) {
        A n[VEC], rstd = rstds[row], mean = means[row];
        gradient(row, i, dz, n, f);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            if (WEIGHT) dz[j] *= weight[i][j];
            dz[j] = rstd * (dz[j] - n[j] * mean);
        }
    };
    for (int row = group(); row < part.rows; row += GROUPS)
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (column(i) >= part.width) continue;
            A dz[VEC], f[VEC];
            dz_of(row, i, dz, f);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                sum_dz[i][j] += dz[j];
                sum_dzf[i][j] += dz[j] * (f[j] - jf[i][j]);
            }
        }
    sum_columns(sum_dz, columns, at.slice);
    sum_columns(sum_dzf, columns, at.slice);
    if (WEIGHT) sum_columns(sum_dyn, columns, at.slice);

    i64 plane = args.B * args.S * args.D;
    global<A> partial = args.partials + part.unit * args.D;
    write_columns(partial + plane, part, sum_dzf);
    if (WEIGHT) write_columns(partial + 2 * plane, part, sum_dyn);
    A to_dx[ITEMS][VEC], to_df[ITEMS][VEC];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            A jdz = sum_dz[i][j] * a_token;
            to_dx[i][j] = -alpha[i][j] * jdz;
            to_df[i][j] = (alpha[i][j] - beta[i][j]) * jdz;
            sum_dz[i][j] *= jf[i][j] - jx[i][j];  // the part of dalpha
        }
    write_columns(partial, part, sum_dz);

    for (int row = group(); row < part.rows; row += GROUPS)
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (column(i) >= part.width) continue;
            A dz[VEC], f[VEC], dx[VEC];
            dz_of(row, i, dz, f);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                dx[j] = dz[j] + to_dx[i][j];
                f[j] = beta[i][j] * dz[j] + to_df[i][j];
            }
            i64 to = part.row_of(row, args.D) + column(i);
            store(args.y + to, narrow<T>(dx));
            store(args.df + to, narrow<T>(f));
        }
}
#endif
