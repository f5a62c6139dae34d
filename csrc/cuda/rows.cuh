// Rows of a residual merge: what residual_rmsnorm.cu and mvsplit_sweeps.cuh share.
//
//   y = z * rstd * weight    rstd = rsqrt(mean_d z^2 + eps)    n = z * rstd
//   dz = rstd * (g - n * mean_d(g * n))    g = dy * weight     dweight = sum dy * n
//
// LANES threads own a row and walk through a run of rows; thread `lane` has the vectors
// lane, lane + LANES, .. of it, ITEMS of them, whose loads are all in flight before the first is
// used. Parameters lie in shared memory as A, read from global memory once a block.
// Preconditions: VEC divides D, pointers aligned to a vector, LANES * ITEMS * VEC >= D; LANES is
// 32 or a larger power of two, THREADS a multiple of it.
#pragma once
#include <common.cuh>

#ifndef VEC
#define VEC 4
#define LANES 32
#define ITEMS 2
#define THREADS 256
#define SCALE 1   // z has scale * f, not f
#define WEIGHT 0  // y has a weight
#define BRANCH 1  // backward computes n from x and f; else what is kept is n itself
#define BACKWARD 0
#endif
#ifndef CARRY
#define CARRY 0  // forward sums what it stores
#endif
// Threads that an SM's registers hold: 85 registers each forward with one gain and rows of 16 bits,
// 128 with more, 170 where backward has the sums of two gains.
constexpr int MORE = WEIGHT + CARRY + (sizeof(T) > 2);
constexpr int AT_ONCE = BACKWARD ? (WEIGHT ? 384 : 512) : MORE == 0 ? 768 : MORE == 3 ? 256 : 512;
constexpr int RESIDENT = THREADS < AT_ONCE ? AT_ONCE / THREADS : 1;
constexpr int GROUPS = THREADS / LANES;  // rows that a block has in hand at once
constexpr int WARPS = THREADS / 32;

DEVICE int lane() { return tid() % LANES; }
DEVICE int group() { return tid() / LANES; }
DEVICE int column(int item) { return (lane() + item * LANES) * VEC; }

// Shared memory, in A: two places for the sums of warps, the vectors of D that a kernel takes, and
// GROUPS rows of D for sums over its rows.
struct Shared {
    A *scratch, *next;
    int D;
    DEVICE explicit Shared(int D)
        : scratch((A*)dynamic_shared()), next(scratch + 2 * WARPS), D(D) {}
    DEVICE A* take(bool wanted = true) {
        A* vector = next;
        if (wanted) next += D;
        return vector;
    }
};

// A parameter into shared memory, where all of the block finds it after the next barrier.
DEVICE void stage(const Parameter& p, A* to, int D) {
    for (int d = tid() * VEC; d < D; d += THREADS * VEC) {
        A values[VEC];
        load_parameter<VEC>(p, d, true, values);
        store_shared(to + d, narrow<A>(values));
    }
}

struct Row {
    vec<T, VEC> at[ITEMS];
};

DEVICE void load_row(global<T> row, bool live, int D, Row& out) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        out.at[i] = {};
        if (live && column(i) < D) out.at[i] = load<VEC>(row + column(i));
    }
}

DEVICE void store_vector(global<T> row, int item, bool live, int D, const A (&values)[VEC]) {
    if (live && column(item) < D) store(row + column(item), narrow<T>(values));
}

// A parameter's values for vector `item`; anything where the row has ended.
DEVICE void read(const A* from, int item, int D, A (&out)[VEC]) {
    widen<A, VEC>(load_shared<VEC>(from + (column(item) < D ? column(item) : 0)), out);
}

// The sum over the row of each thread's v. All of the block take part; `turn` alternates between
// two places, so that one barrier a row is enough.
DEVICE A sum_row(A v, A* scratch, int& turn) {
    v = sum_lanes<32>(v);
    if (LANES == 32) return v;
    A* parts = scratch + turn * WARPS;
    turn ^= 1;
    if (tid() % 32 == 0) parts[tid() / 32] = v;
    barrier_sync();
    constexpr int EACH = LANES / 32;
    A sum = parts[group() * EACH];
#pragma unroll
    for (int i = 1; i < EACH; ++i) sum += parts[group() * EACH + i];
    return sum;
}

// z = x + scale * f + shift of one vector; no shift: nullptr.
DEVICE void merge(const Row& x, const Row& f, const A* scale, const A* shift, int item, int D,
                  A (&z)[VEC]) {
    A branch[VEC], s[VEC], more[VEC];
    widen<T, VEC>(x.at[item], z);
    widen<T, VEC>(f.at[item], branch);
    if (SCALE) read(scale, item, D, s);
    if (shift) read(shift, item, D, more);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        z[j] += SCALE ? s[j] * branch[j] : branch[j];
        if (shift) z[j] += more[j];
    }
}

struct Forward {
    global<T> x, f, y;
    global<A> rstd;
    A *scale, *shift, *weight, *scratch;  // in shared memory
    int D;
    A eps;
};

// Rows [begin, end), and the sums of their results as stored, if anyone wants them.
template <bool SUM>
DEVICE void forward_rows(const Forward& at, i64 begin, i64 end, A (&sums)[ITEMS][VEC]) {
    int D = at.D, turn = 0;
    for (i64 first = begin; first < end; first += GROUPS) {
        i64 r = first + group();
        bool live = r < end;
        Row x, f;
        load_row(at.x + r * D, live, D, x);
        load_row(at.f + r * D, live, D, f);
        A z[ITEMS][VEC], squares = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            merge(x, f, at.scale, at.shift, i, D, z[i]);
            bool inside = column(i) < D;
#pragma unroll
            for (int j = 0; j < VEC; ++j) squares += inside ? z[i][j] * z[i][j] : 0;
        }
        A rstd = reciprocal_root(sum_row(squares, at.scratch, turn) / D + at.eps);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            A w[VEC];
            if (WEIGHT) read(at.weight, i, D, w);
#pragma unroll
            for (int j = 0; j < VEC; ++j) z[i][j] *= WEIGHT ? rstd * w[j] : rstd;
            vec<T, VEC> y = narrow<T>(z[i]);
            if (live && column(i) < D) store(at.y + r * D + column(i), y);
            if (SUM && live) {
                widen<T, VEC>(y, z[i]);
#pragma unroll
                for (int j = 0; j < VEC; ++j) sums[i][j] += z[i][j];
            }
        }
        if (live && lane() == 0) store_one(at.rstd + r, rstd);
    }
}

struct Backward {
    global<T> dy, x, f;  // x: what forward kept, x or y
    global<A> rstd;
    A *scale, *shift, *weight, *scratch;  // in shared memory
    int D;
};

// dz of row r in vectors, with f beside it; mean_d(g * n) is returned. Adds to dweight.
DEVICE A backward_row(const Backward& at, i64 r, bool live, int& turn, Row& f, A (&dz)[ITEMS][VEC],
                      A (&dweight)[ITEMS][VEC]) {
    int D = at.D;
    Row dy, x;
    load_row(at.dy + r * D, live, D, dy);
    load_row(at.x + r * D, live, D, x);
    if (BRANCH || SCALE) load_row(at.f + r * D, live, D, f);
    A rstd = live ? load_one(at.rstd + r) : 0;
    A n[ITEMS][VEC], product = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        widen<T, VEC>(dy.at[i], dz[i]);
        if (BRANCH)
            merge(x, f, at.scale, at.shift, i, D, n[i]);
        else
            widen<T, VEC>(x.at[i], n[i]);
        A w[VEC];
        if (WEIGHT) read(at.weight, i, D, w);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            if (BRANCH) n[i][j] *= rstd;
            if (WEIGHT) {
                dweight[i][j] += dz[i][j] * n[i][j];
                dz[i][j] *= w[j];
            }
            product += dz[i][j] * n[i][j];  // dy is zero where the row has ended
        }
    }
    A mean = sum_row(product, at.scratch, turn) / D;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j) dz[i][j] = rstd * (dz[i][j] - n[i][j] * mean);
    return mean;
}

// Sums that each thread has of its columns, added over the block's groups: one row of D.
DEVICE void store_columns(const A (&sums)[ITEMS][VEC], A* columns, int D, global<A> to) {
    if (GROUPS > 1) barrier_sync();
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        if (column(i) >= D) continue;
        if (GROUPS == 1) {
            store(to + column(i), narrow<A>(sums[i]));
        } else {
            store_shared(columns + group() * D + column(i), narrow<A>(sums[i]));
        }
    }
    if (GROUPS == 1) return;
    barrier_sync();
    for (int d = tid(); d < D; d += THREADS) {
        A sum = columns[d];
        for (int g = 1; g < GROUPS; ++g) sum += columns[g * D + d];
        store_one(to + d, sum);
    }
}
