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

#ifndef VEC
#define VEC 4
#define LANES 8
#define ITEMS 1
#define THREADS 256
#define WEIGHT 0
#define CARRY 0  // forward leaves the segment means of y
#define BACKWARD 0
#define COPY 0
#endif
constexpr int GROUPS = THREADS / LANES, WARPS = THREADS / 32, CHUNKS = 4;
constexpr int PLAIN = 0, ASYNC = 1, BULK = 2;  // COPY
static_assert(COPY == PLAIN || VEC * sizeof(T) == 16, "");

struct Args {
    global<T> x, f, dy, y, df;  // backward: x is what forward kept, y is dx
    global<A> rstd, jx, jf;
    global<A> given, jy;        // forward: jx if it was given; CARRY
    global<A> partials;         // backward: (2 or 3, B * S, D)
    Parameter alpha, beta, weight;
    i64 B, tokens, D, S;
    i64 slice, rows;  // columns of a block; rows that its shared memory holds
    double eps;
    Segment segments[MOST_SEGMENTS];
};

// What a block works on.
struct Part {
    int rank, ranks, width, rows, Ts;
    i64 unit, row0, column0;  // (sample, segment); first row of N = B * T, first column

    DEVICE explicit Part(const Args& args) {
        rank = cluster_ctarank(), ranks = cluster_nctarank();
        i64 cluster = ctaid() / ranks, b = cluster % args.B;
        Segment segment = args.segments[cluster / args.B];
        unit = b * args.S + segment.index;
        row0 = b * args.tokens + segment.begin;
        Ts = rows = segment.end - segment.begin;
        column0 = rank * args.slice;
        i64 left = args.D - column0;
        width = (int)(left < 0 ? 0 : left < args.slice ? left : args.slice);
    }
    DEVICE i64 row_of(int row, i64 D) const { return (row0 + row) * D + column0; }
};

DEVICE int align(int bytes) { return (bytes + 15) / 16 * 16; }

// Where things lie in shared memory; the launcher computes the same size (cluster_shared).
struct Layout {
    char* base;
    int slice, rows, tensor, statistic;

    DEVICE explicit Layout(const Args& args)
        : base(dynamic_shared()), slice((int)args.slice), rows((int)args.rows) {
        tensor = align(rows * slice * (int)sizeof(T));
        statistic = align(rows * (int)sizeof(A));
    }
    DEVICE u64* barriers() const { return (u64*)base; }
    DEVICE T* rows_of(int i) const { return (T*)(base + 64 + i * tensor); }
    DEVICE A* statistics(int i, int tensors) const {
        return (A*)(base + 64 + tensors * tensor + i * statistic);
    }
    DEVICE A* columns(int tensors) const { return statistics(tensors, tensors); }  // [WARPS][slice]
};

DEVICE int lane() { return tid() % LANES; }
DEVICE int group() { return tid() / LANES; }
DEVICE int column(int item) { return (lane() + item * LANES) * VEC; }
DEVICE int chunk_rows(const Part& part) { return ceil_div(part.rows, CHUNKS); }

// Starts to bring `count` tensors' parts into shared memory: a bulk copy a row, or VEC a thread.
template <int count>
DEVICE void fetch_bulk(const Args& args, const Part& part, const Layout& at,
                       const global<T> (&tensors)[count]) {
    int chunk = chunk_rows(part);
    u32 row_bytes = part.width * sizeof(T);
    if (tid() == 0)
        for (int c = 0; c < CHUNKS; ++c) {
            int left = part.rows - c * chunk;
            int rows = left < 0 ? 0 : left < chunk ? left : chunk;
            mbarrier_arrive_expect_tx(at.barriers() + c, rows * row_bytes * count);
        }
    if (part.width == 0) return;
    for (int row = tid(); row < part.rows; row += THREADS)
#pragma unroll
        for (int i = 0; i < count; ++i) {
            global<T> from = tensors[i] + part.row_of(row, args.D);
            cp_async_bulk_shared_global(at.rows_of(i) + row * at.slice, from.at, row_bytes,
                                        at.barriers() + row / chunk);
        }
}

template <int count>
DEVICE void fetch_vectors(const Args& args, const Part& part, const Layout& at,
                          const global<T> (&tensors)[count]) {
    int chunk = chunk_rows(part);
    for (int c = 0; c < CHUNKS; ++c) {
        int end = (c + 1) * chunk < part.rows ? (c + 1) * chunk : part.rows;
        for (int row = c * chunk + group(); row < end; row += GROUPS)
#pragma unroll
            for (int item = 0; item < ITEMS; ++item) {
                if (column(item) >= part.width) continue;
#pragma unroll
                for (int i = 0; i < count; ++i) {
                    global<T> from = tensors[i] + part.row_of(row, args.D) + column(item);
                    T* to = at.rows_of(i) + row * at.slice + column(item);
                    if (COPY == ASYNC) cp_async_cg_shared_global_16(to, from.at);
                    else store_shared(to, load<VEC>(from));
                }
            }
        if (COPY == ASYNC) cp_async_mbarrier_arrive_noinc(at.barriers() + c);
    }
}

template <int count>
DEVICE void fetch(const Args& args, const Part& part, const Layout& at,
                  const global<T> (&tensors)[count]) {
    if (COPY != PLAIN && tid() == 0) {
        for (int c = 0; c < CHUNKS; ++c)
            mbarrier_init(at.barriers() + c, COPY == BULK ? 1 : THREADS);
        fence_mbarrier_init();
    }
    if (COPY != PLAIN) barrier_sync();
    if constexpr (COPY == BULK) fetch_bulk(args, part, at, tensors);
    else fetch_vectors(args, part, at, tensors);
    if (COPY == PLAIN) barrier_sync();
}

// Until a row is there.
DEVICE void await(const Part& part, const Layout& at, int row) {
    if (COPY != PLAIN)
        while (!mbarrier_try_wait_parity(at.barriers() + row / chunk_rows(part), 0)) {
        }
}

// Vector `item` of a row in shared memory, widened.
DEVICE void read(const T* rows, int slice, int row, int item, A (&out)[VEC]) {
    widen<T, VEC>(load_shared<VEC>(rows + row * slice + column(item)), out);
}

// A parameter's or a mean's values of the block's columns, read once: the first group of rows puts
// them into shared memory (place `slot` of the sums' WARPS), and take() gives them to every group.
DEVICE void put(const A (&values)[ITEMS][VEC], A* columns, int slice, int slot) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
        if (group() == 0 && column(i) < slice)
            store_shared(columns + slot * slice + column(i), narrow<A>(values[i]));
}
DEVICE void put(const Parameter& p, const Part& part, A* columns, int slice, int slot) {
    A values[ITEMS][VEC];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        bool live = group() == 0 && column(i) < part.width;
        load_parameter<VEC>(p, part.column0 + column(i), live, values[i]);
    }
    put(values, columns, slice, slot);
}
DEVICE void put(global<A> means, const Args& args, const Part& part, A* columns, int slice,
                int slot) {
    global<A> from = means + part.unit * args.D + part.column0;
    A values[ITEMS][VEC];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) values[i][j] = 0;
        if (group() == 0 && column(i) < part.width)
            widen<A, VEC>(load<VEC>(from + column(i)), values[i]);
    }
    put(values, columns, slice, slot);
}
DEVICE void take(A (&values)[ITEMS][VEC], const A* columns, int slice, int slot) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) values[i][j] = 0;
        if (column(i) < slice)
            widen<A, VEC>(load_shared<VEC>(columns + slot * slice + column(i)), values[i]);
    }
}
// By the threads of the first row's group: every group has the same values.
DEVICE void write_columns(global<A> to, const Part& part, const A (&values)[ITEMS][VEC]) {
    if (group()) return;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
        if (column(i) < part.width) store(to + part.column0 + column(i), narrow<A>(values[i]));
}

// Each thread's sums of its columns become those of the block, in a fixed order.
DEVICE void sum_columns(A (&sums)[ITEMS][VEC], A* columns, int slice) {
    int warp = tid() / 32;
    barrier_sync();
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) sums[i][j] = sum_lanes<32 / LANES>(sums[i][j], LANES);
        if (tid() % 32 < LANES && column(i) < slice)
            store_shared(columns + warp * slice + column(i), narrow<A>(sums[i]));
    }
    barrier_sync();
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        if (column(i) >= slice) continue;
        widen<A, VEC>(load_shared<VEC>(columns + column(i)), sums[i]);
#pragma unroll
        for (int w = 1; w < WARPS; ++w) {
            A more[VEC];
            widen<A, VEC>(load_shared<VEC>(columns + w * slice + column(i)), more);
#pragma unroll
            for (int j = 0; j < VEC; ++j) sums[i][j] += more[j];
        }
    }
}

DEVICE void put_remote(u32 at, float v) { st_shared_cluster_b32(at, mov_b32(v)); }
DEVICE void put_remote(u32 at, double v) { st_shared_cluster_b64(at, mov_b64(v)); }
DEVICE float get_remote(u32 at, float) { return mov_f32(ld_shared_cluster_b32(at)); }
DEVICE double get_remote(u32 at, double) { return mov_f64(ld_shared_cluster_b64(at)); }

DEVICE void cluster_sync() {
    barrier_cluster_arrive_release();
    barrier_cluster_wait_acquire();
}

// sums[row] of every block added up, turned into statistics[row] by `finish(row, sum)` in one block
// and handed to all. Row r is the work of block r / (rows of a block), whose threads read it from
// each block, `ranks` of them side by side: the sum is a butterfly, in a fixed order.
template <typename Finish>
DEVICE void share_rows(const Part& part, A* sums, A* statistics, Finish finish) {
    cluster_sync();
    int each = ceil_div(part.rows, part.ranks);
    int peer = tid() % part.ranks;
    for (int base = 0; base < each * part.ranks; base += THREADS) {
        int mine = (base + tid()) / part.ranks, row = part.rank * each + mine;
        bool live = mine < each && row < part.rows;
        A sum = live ? get_remote(mapa_shared_cluster(sums + row, peer), A()) : 0;
        for (int d = part.ranks / 2; d > 0; d /= 2) sum += shuffle_xor(sum, d);
        if (!live) continue;
        A statistic = finish(row, sum, peer == 0);
        put_remote(mapa_shared_cluster(statistics + row, peer), statistic);
    }
    cluster_sync();
}

#if !BACKWARD
KERNEL(cluster_fwd, Args, THREADS, ITEMS == 1 && !WEIGHT ? 3 : 2) {
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
    for (int row = group(); row < part.rows; row += GROUPS) {
        await(part, at, row);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (column(i) >= part.width) continue;
            A x[VEC], f[VEC];
            read(xs, at.slice, row, i, x);
            read(fs, at.slice, row, i, f);
#pragma unroll
            for (int j = 0; j < VEC; ++j) jx[i][j] += x[j], jf[i][j] += f[j];
        }
    }
    sum_columns(jf, columns, at.slice);
    if (!args.given) sum_columns(jx, columns, at.slice);

    A shift[ITEMS][VEC];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            jf[i][j] /= part.Ts;
            jx[i][j] = args.given ? given[i][j] : jx[i][j] / part.Ts;
            shift[i][j] = shift_of(alpha[i][j], beta[i][j], jx[i][j], jf[i][j]);
        }
    i64 unit = part.unit * args.D;
    write_columns(args.jf + unit, part, jf);
    if (!args.given) write_columns(args.jx + unit, part, jx);

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
    share_rows(part, sums, rstds, [&](int row, A sum, bool first) {
        A rstd = reciprocal_root(sum / (A)args.D + (A)args.eps);
        if (first) store_one(args.rstd + part.row0 + row, rstd);
        return rstd;
    });

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
        for (int j = 0; j < VEC; ++j) jy[i][j] /= part.Ts;
    write_columns(args.jy + unit, part, jy);
}

#else
KERNEL(cluster_bwd, Args, THREADS, 2) {
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
    for (int first = 0; first < part.rows; first += GROUPS) {
        int row = first + group();
        bool live = row < part.rows;
        if (live) await(part, at, row);
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
    share_rows(part, sums, means, [&](int, A sum, bool) { return sum / (A)args.D; });

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
            A jdz = sum_dz[i][j] / part.Ts;
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
