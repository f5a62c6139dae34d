// A segment of (B, T, D) tensors spread over a thread-block cluster: data movement and sums of the
// kernels in mvsplit_cluster.cuh. A block has a slice of the columns of all rows of the segment.
//
//   Tile, Layout          the data of a block, and their offsets in shared memory
//   fetch, Arrivals       copy rows to shared memory, all in flight at once; wait for them
//   stage, load_staged    read a parameter or a mean from global memory once per block
//   sum_columns           sums over the rows of the block, in a fixed order
//   reduce_rows           sums over columns, one scalar per row of the cluster, in a fixed order
#pragma once

#ifndef VEC
#define VEC 4
#define LANES 8
#define ITEMS 1
#define THREADS 256
#define WEIGHT 0
#define CARRY 0  // forward also returns the segment means of y
#define BACKWARD 0
#define COPY 0
#endif
constexpr int GROUPS = THREADS / LANES, WARPS = THREADS / 32, CHUNKS = 4;
constexpr int PLAIN = 0, ASYNC = 1, BULK = 2;  // values of COPY, see fetch
static_assert(COPY == PLAIN || VEC * sizeof(T) == 16, "");

struct Args {
    global<T> x, f, dy, y, df;  // backward: x is the saved tensor, x or y; y is dx
    global<A> rstd, jx, jf;
    global<A> input_jx, jy;  // forward: jx if it is an input; means of y if CARRY
    global<A> partials;      // backward: (2 or 3, B * S, D)
    Parameter alpha, beta, weight;
    i64 B, tokens, D, S;
    i64 slice, rows;  // columns of a block; rows for which its shared memory has space
    double eps;
    Segment segments[MOST_SEGMENTS];
};

// The columns of one segment that a block computes.
struct Tile {
    int rank, ranks, width, rows, Ts;
    i64 unit, row0, column0;  // index of (sample, segment); first row of B * T; first column

    DEVICE explicit Tile(const Args& args) {
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
    DEVICE int rows_per_rank() const { return ceil_div(rows, ranks); }  // see reduce_rows
    DEVICE i64 row_offset(int row, i64 D) const { return (row0 + row) * D + column0; }
};

DEVICE int align(int bytes) { return (bytes + 15) / 16 * 16; }

// Offsets in shared memory; clusters() in _cuda/mvsplit_rmsnorm.py computes the same total size.
struct Layout {
    char* base;
    int slice, rows, tensor, statistic;

    DEVICE explicit Layout(const Args& args)
        : base(dynamic_shared()), slice((int)args.slice), rows((int)args.rows) {
        tensor = align(rows * slice * (int)sizeof(T));
        statistic = align(rows * (int)sizeof(A));
    }
    DEVICE u64* barriers() const { return (u64*)base; }
    DEVICE T* tensor_rows(int i) const { return (T*)(base + 64 + i * tensor); }
    DEVICE A* statistics(int i, int tensors) const {
        return (A*)(base + 64 + tensors * tensor + i * statistic);
    }
    DEVICE A* columns(int tensors) const { return statistics(tensors, tensors); }  // [WARPS][slice]
};

DEVICE int lane() { return tid() % LANES; }
DEVICE int group() { return tid() / LANES; }
DEVICE int column(int item) { return (lane() + item * LANES) * VEC; }
// Rows per mbarrier, a multiple of GROUPS, so that each round of GROUPS rows waits for only one.
DEVICE int chunk_rows(const Tile& tile) {
    return ceil_div(ceil_div(tile.rows, CHUNKS), GROUPS) * GROUPS;
}

// Start the copy of this tile of `count` tensors to shared memory: one bulk copy per row, or one
// vector per thread at a time.
template <int count>
DEVICE void fetch_bulk(const Args& args, const Tile& tile, const Layout& layout,
                       const global<T> (&tensors)[count]) {
    int chunk = chunk_rows(tile);
    u32 row_bytes = tile.width * sizeof(T);
    if (tid() == 0)
        for (int c = 0; c < CHUNKS; ++c) {
            int left = tile.rows - c * chunk;
            int rows = left < 0 ? 0 : left < chunk ? left : chunk;
            mbarrier_arrive_expect_tx(layout.barriers() + c, rows * row_bytes * count);
        }
    if (tile.width == 0) return;
    for (int row = tid(); row < tile.rows; row += THREADS)
#pragma unroll
        for (int i = 0; i < count; ++i) {
            global<T> from = tensors[i] + tile.row_offset(row, args.D);
            cp_async_bulk_shared_global(layout.tensor_rows(i) + row * layout.slice, from.address,
                                        row_bytes, layout.barriers() + row / chunk);
        }
}

template <int count>
DEVICE void fetch_vectors(const Args& args, const Tile& tile, const Layout& layout,
                          const global<T> (&tensors)[count]) {
    int chunk = chunk_rows(tile), row = group(), to = row * layout.slice;
    i64 from = tile.row_offset(row, args.D), step = GROUPS * args.D;
    for (int c = 0; c < CHUNKS; ++c) {
        int end = (c + 1) * chunk < tile.rows ? (c + 1) * chunk : tile.rows;
        for (; row < end; row += GROUPS, from += step, to += GROUPS * layout.slice)
#pragma unroll
            for (int item = 0; item < ITEMS; ++item) {
                if (column(item) >= tile.width) continue;
#pragma unroll
                for (int i = 0; i < count; ++i) {
                    global<T> source = tensors[i] + (from + column(item));
                    T* target = layout.tensor_rows(i) + to + column(item);
                    if (COPY == ASYNC)
                        cp_async_cg_shared_global_16(target, source.address);
                    else
                        store_shared(target, load<VEC>(source));
                }
            }
        if (COPY == ASYNC) cp_async_mbarrier_arrive_noinc(layout.barriers() + c);
    }
}

template <int count>
DEVICE void fetch(const Args& args, const Tile& tile, const Layout& layout,
                  const global<T> (&tensors)[count]) {
    if (COPY != PLAIN && tid() == 0) {
        for (int c = 0; c < CHUNKS; ++c)
            mbarrier_init(layout.barriers() + c, COPY == BULK ? 1 : THREADS);
        fence_mbarrier_init();
        if (COPY == BULK) fence_proxy_async_shared_cta();
    }
    if (COPY != PLAIN) barrier_sync();
    if constexpr (COPY == BULK)
        fetch_bulk(args, tile, layout, tensors);
    else
        fetch_vectors(args, tile, layout, tensors);
    if (COPY == PLAIN) barrier_sync();
}

// Arrival of the rows in shared memory; the rounds must be awaited in order.
struct Arrivals {
    u64* barrier;
    int chunk, next = 0;
    DEVICE Arrivals(const Tile& tile, const Layout& layout)
        : barrier(layout.barriers()), chunk(chunk_rows(tile)) {}
    DEVICE void await(int first) {  // the round that starts with row `first`
        if (COPY == PLAIN || first != next) return;
        while (!mbarrier_try_wait_parity(barrier, 0)) {
        }
        ++barrier, next += chunk;
    }
};

// Read vector `item` of a row in shared memory.
DEVICE void read(const T* rows, int slice, int row, int item, A (&out)[VEC]) {
    widen<T, VEC>(load_shared<VEC>(rows + row * slice + column(item)), out);
}

// Values of a parameter or a mean for the columns of the block, read from global memory once. The
// threads of the first group write them to shared memory, in row `slot` of the WARPS rows for
// column sums, and load_staged() gives them to all groups.
DEVICE void stage(const A (&values)[ITEMS][VEC], A* columns, int slice, int slot) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
        if (group() == 0 && column(i) < slice)
            store_shared(columns + slot * slice + column(i), narrow<A>(values[i]));
}
DEVICE void stage(const Parameter& p, const Tile& tile, A* columns, int slice, int slot) {
    A values[ITEMS][VEC];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        bool live = group() == 0 && column(i) < tile.width;
        load_parameter<VEC>(p, tile.column0 + column(i), live, values[i]);
    }
    stage(values, columns, slice, slot);
}
DEVICE void stage(global<A> means, const Args& args, const Tile& tile, A* columns, int slice,
                  int slot) {
    global<A> from = means + tile.unit * args.D + tile.column0;
    A values[ITEMS][VEC];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) values[i][j] = 0;
        if (group() == 0 && column(i) < tile.width)
            widen<A, VEC>(load<VEC>(from + column(i)), values[i]);
    }
    stage(values, columns, slice, slot);
}
DEVICE void load_staged(A (&values)[ITEMS][VEC], const A* columns, int slice, int slot) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) values[i][j] = 0;
        if (column(i) < slice)
            widen<A, VEC>(load_shared<VEC>(columns + slot * slice + column(i)), values[i]);
    }
}
// Store values of columns. Only the first group does, because all groups have the same values.
template <typename V>
DEVICE void write_columns(global<A> to, const Tile& tile, const V (&values)[ITEMS][VEC]) {
    if (group()) return;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        A rounded[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) rounded[j] = (A)values[i][j];
        if (column(i) < tile.width) store(to + tile.column0 + column(i), narrow<A>(rounded));
    }
}

// Add one vector of `count` rows: as a tree, whose sum of equal rows is exact, or in double to `sum`.
template <int count, typename V>
DEVICE void sum_warps(const A* rows, int slice, V (&sum)[VEC]) {
    if constexpr (sizeof(V) == 8) {
#pragma unroll 2
        for (int w = 0; w < count; ++w) {
            A values[VEC];
            widen<A, VEC>(load_shared<VEC>(rows + w * slice), values);
#pragma unroll
            for (int j = 0; j < VEC; ++j) sum[j] += values[j];
        }
    } else if constexpr (count == 1) {
        widen<A, VEC>(load_shared<VEC>(rows), sum);
    } else {
        V more[VEC];
        sum_warps<count / 2>(rows, slice, sum);
        sum_warps<count / 2>(rows + count / 2 * slice, slice, more);
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] += more[j];
    }
}

// Add one vector of each warp's row in pairs: fewer registers than a tree, which would spill forward
// with a weight and a carried mean.
template <typename V>
DEVICE void sum_pairs_of_warps(const A* rows, int slice, V (&sum)[VEC]) {
#pragma unroll
    for (int w = 0; w < WARPS; w += 2) {
        vec<A, VEC> even = load_shared<VEC>(rows + w * slice);
        vec<A, VEC> odd = load_shared<VEC>(rows + (w + 1) * slice);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            A pair = element<A>(even, j) + element<A>(odd, j);
            sum[j] = w ? sum[j] + pair : pair;
        }
    }
}

// Replace the column sums of each thread by those of the block, added in a fixed order. The shared
// memory has the size of A: of a sum in double first the rounded value is exchanged, then the rest.
DEVICE void sum_columns(Total (&sums)[ITEMS][VEC], A* columns, int slice) {
    constexpr int PARTS = sizeof(Total) / sizeof(A);
    int warp = tid() / 32;
    Total left[ITEMS][VEC];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j)
            left[i][j] = sum_lanes<32 / LANES>(sums[i][j], LANES), sums[i][j] = 0;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        barrier_sync();
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            A rounded[VEC];
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                rounded[j] = (A)left[i][j];
                bool finite = rounded[j] - rounded[j] == 0;
                left[i][j] = finite ? left[i][j] - rounded[j] : 0;  // not inf - inf
            }
            if (tid() % 32 < LANES && column(i) < slice)
                store_shared(columns + warp * slice + column(i), narrow<A>(rounded));
        }
        barrier_sync();
#pragma unroll
        for (int i = 0; i < ITEMS; ++i)
            if (column(i) < slice) {
                if constexpr (!BACKWARD && WEIGHT && CARRY && sizeof(Total) == 4)
                    sum_pairs_of_warps(columns + column(i), slice, sums[i]);
                else
                    sum_warps<WARPS>(columns + column(i), slice, sums[i]);
            }
    }
}

DEVICE void store_remote(u32 address, float v) { st_shared_cluster_b32(address, mov_b32(v)); }
DEVICE void store_remote(u32 address, double v) { st_shared_cluster_b64(address, mov_b64(v)); }
DEVICE float load_remote(u32 address, float) { return mov_f32(ld_shared_cluster_b32(address)); }
DEVICE double load_remote(u32 address, double) { return mov_f64(ld_shared_cluster_b64(address)); }

DEVICE void cluster_sync() {
    barrier_cluster_arrive_release();
    barrier_cluster_wait_acquire();
}

// Add sums[row] over the blocks of the cluster and store finish(sum) to statistics[row] of each.
// Row r is computed by block r / rows_per_rank(): `ranks` adjacent threads read it, each from
// another block, and a butterfly adds them in a fixed order. Call this before stores to global
// memory, because the cluster barriers would wait for them.
template <typename Finish>
DEVICE void reduce_rows(const Tile& tile, A* sums, A* statistics, Finish finish) {
    cluster_sync();
    int rows_per_rank = tile.rows_per_rank();
    int peer = tid() % tile.ranks;
    for (int base = 0; base < rows_per_rank * tile.ranks; base += THREADS) {
        int index = (base + tid()) / tile.ranks, row = tile.rank * rows_per_rank + index;
        bool live = index < rows_per_rank && row < tile.rows;
        A sum = live ? load_remote(mapa_shared_cluster(sums + row, peer), A()) : 0;
        for (int d = tile.ranks / 2; d > 0; d /= 2) sum += shuffle_xor(sum, d);
        if (!live) continue;
        store_remote(mapa_shared_cluster(statistics + row, peer), finish(sum));
    }
    cluster_sync();
}
