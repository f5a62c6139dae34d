// A segment of (B, T, D) tensors spread over a thread-block cluster: what mvsplit_cluster.cuh's
// kernels do apart from their arithmetic. A block has a slice of the columns, of all its rows.
//
//   Part, Layout    what a block works on, and where it lies in shared memory
//   fetch           rows into shared memory, all in flight at once; Arrivals waits for them
//   put, take       a parameter or a mean, read from global memory once a block
//   sum_columns     sums over rows: of the block, in a fixed order
//   share_rows      sums over columns: of the cluster, a scalar a row, in a fixed order
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
constexpr int PLAIN = 0, ASYNC = 1, BULK = 2;  // what COPY says, see fetch
static_assert(COPY == PLAIN || VEC * sizeof(T) == 16, "");

struct Args {
    global<T> x, f, dy, y, df;  // backward: x is what forward kept, y is dx
    global<A> rstd, jx, jf;
    global<A> given, jy;  // forward: jx if it was given; CARRY
    global<A> partials;   // backward: (2 or 3, B * S, D)
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
    DEVICE int rows_each() const { return ceil_div(rows, ranks); }  // of a block in share_rows
    DEVICE i64 row_of(int row, i64 D) const { return (row0 + row) * D + column0; }
};

DEVICE int align(int bytes) { return (bytes + 15) / 16 * 16; }

// Where things lie in shared memory; clusters() in _cuda/mvsplit_rmsnorm.py computes the same size.
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
// Rows that have a barrier of their own: whole rounds of GROUPS, so that a round waits for one.
DEVICE int chunk_rows(const Part& part) {
    return ceil_div(ceil_div(part.rows, CHUNKS), GROUPS) * GROUPS;
}

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
    int chunk = chunk_rows(part), row = group(), to = row * at.slice;
    i64 from = part.row_of(row, args.D), step = GROUPS * args.D;
    for (int c = 0; c < CHUNKS; ++c) {
        int end = (c + 1) * chunk < part.rows ? (c + 1) * chunk : part.rows;
        for (; row < end; row += GROUPS, from += step, to += GROUPS * at.slice)
#pragma unroll
            for (int item = 0; item < ITEMS; ++item) {
                if (column(item) >= part.width) continue;
#pragma unroll
                for (int i = 0; i < count; ++i) {
                    global<T> source = tensors[i] + (from + column(item));
                    T* target = at.rows_of(i) + to + column(item);
                    if (COPY == ASYNC)
                        cp_async_cg_shared_global_16(target, source.at);
                    else
                        store_shared(target, load<VEC>(source));
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
        if (COPY == BULK) fence_proxy_async_shared_cta();
    }
    if (COPY != PLAIN) barrier_sync();
    if constexpr (COPY == BULK)
        fetch_bulk(args, part, at, tensors);
    else
        fetch_vectors(args, part, at, tensors);
    if (COPY == PLAIN) barrier_sync();
}

// Rounds of rows in their order: each waits until its rows are there.
struct Arrivals {
    u64* barrier;
    int chunk, next = 0;
    DEVICE Arrivals(const Part& part, const Layout& at)
        : barrier(at.barriers()), chunk(chunk_rows(part)) {}
    DEVICE void await(int first) {  // the round of rows from `first` on
        if (COPY == PLAIN || first != next) return;
        while (!mbarrier_try_wait_parity(barrier, 0)) {
        }
        ++barrier, next += chunk;
    }
};

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

// sums[row] of every block added up, turned into statistics[row] by `finish(sum)` in one block and
// handed to all. A block that has stored to global memory waits for it here: store later. Row r is the work of block r / (rows of a block), whose threads read it from
// each block, `ranks` of them side by side: the sum is a butterfly, in a fixed order.
template <typename Finish>
DEVICE void share_rows(const Part& part, A* sums, A* statistics, Finish finish) {
    cluster_sync();
    int each = part.rows_each();
    int peer = tid() % part.ranks;
    for (int base = 0; base < each * part.ranks; base += THREADS) {
        int mine = (base + tid()) / part.ranks, row = part.rank * each + mine;
        bool live = mine < each && row < part.rows;
        A sum = live ? get_remote(mapa_shared_cluster(sums + row, peer), A()) : 0;
        for (int d = part.ranks / 2; d > 0; d /= 2) sum += shuffle_xor(sum, d);
        if (!live) continue;
        put_remote(mapa_shared_cluster(statistics + row, peer), finish(sum));
    }
    cluster_sync();
}
