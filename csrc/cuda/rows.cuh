// Rows of a residual merge, shared by residual_rmsnorm.cu and mvsplit_sweeps.cuh.
//
//   y = z * rstd * weight    rstd = rsqrt(mean_d z^2 + eps)    n = z * rstd
//   dz = rstd * (g - n * mean_d(g * n))    g = dy * weight     dweight = sum dy * n
//
// LANES threads compute a row and advance through consecutive rows. Thread `lane` has the vectors
// lane, lane + LANES, ... of a row, ITEMS in total, and issues all of their loads before it uses
// the first. Parameters are read from global memory once per block and stay in shared memory as A.
// Preconditions: VEC divides D; pointers aligned to a vector; LANES * ITEMS * VEC >= D; LANES is a
// power of two and at least 32; THREADS is a multiple of LANES.
#pragma once
#include <common.cuh>

#ifndef VEC
#define VEC 4
#define LANES 32
#define ITEMS 2
#define THREADS 256
#define SCALE 1   // z adds scale * f; 0: f
#define WEIGHT 0  // y has a weight
#define BRANCH 1  // backward computes n from x and f; 0: the saved tensor is n
#define BACKWARD 0
#endif
#ifndef CARRY
#define CARRY 0  // forward also sums the rows of y
#endif
#ifndef SHIFT
#define SHIFT 0  // z also depends on the means of a segment
#endif
// Threads for which the registers of an SM must suffice: 85 registers each forward with one gain
// and 16-bit rows, 128 with more, 170 if backward has the sums of two gains.
constexpr int EXTRAS = WEIGHT + CARRY + (sizeof(T) > 2) * (1 + CARRY);
constexpr int SM_THREADS = BACKWARD      ? (WEIGHT ? 384 : 512)
                           : EXTRAS == 0 ? 768
                           : EXTRAS >= 3 ? 256
                                         : 512;
constexpr int RESIDENT = THREADS < SM_THREADS ? SM_THREADS / THREADS : 1;
constexpr int GROUPS = THREADS / LANES;  // rows that a block processes at the same time
constexpr int WARPS = THREADS / 32;
constexpr bool WIDE = ITEMS * VEC > 2 * RUN;  // many elements of a row per thread

DEVICE int lane() { return tid() % LANES; }
DEVICE int group() { return tid() / LANES; }
DEVICE int column(int item) { return (lane() + item * LANES) * VEC; }

// The rows of [begin, end) that a group processes. Each group takes adjacent rows if their sums are
// wanted: values whose signs alternate from token to token then cancel before they grow.
template <bool SUM>
struct GroupRows {
    i64 next, end, rounds;
    DEVICE GroupRows(i64 begin, i64 block_end) : next(begin + group()), end(block_end) {
        rounds = ceil_div<i64>(block_end - begin, GROUPS);
        if (!SUM) return;
        next = begin + group() * rounds;
        if (next + rounds < end) end = next + rounds;
    }
    DEVICE bool left() const { return rounds > 0; }  // the same for all threads of a block
    DEVICE void advance() { --rounds, next += SUM ? 1 : GROUPS; }
};

// Shared memory, in A: 2 * WARPS sums of warps, the vectors of D that a kernel allocates, and
// GROUPS rows of D for sums over rows.
struct Shared {
    A *scratch, *next;
    int D;
    DEVICE explicit Shared(int D)
        : scratch((A*)dynamic_shared()), next(scratch + 2 * WARPS), D(D) {}
    DEVICE A* allocate(bool needed = true) {
        A* vector = next;
        if (needed) next += D;
        return vector;
    }
};

// Copy a parameter to shared memory; the whole block may read it after the next barrier.
DEVICE void stage(const Parameter& p, A* to, int D) {
    for (int d = tid() * VEC; d < D; d += THREADS * VEC) {
        A values[VEC];
        load_parameter<VEC>(p, d, true, values);
        store_shared(to + d, narrow<A>(values));
    }
}

struct Row {
    vec<T, VEC> vectors[ITEMS];
};

DEVICE void load_row(global<T> row, bool live, int D, Row& out) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        out.vectors[i] = {};
        if (live && column(i) < D) out.vectors[i] = load<VEC>(row + column(i));
    }
}

DEVICE void store_vector(global<T> row, int item, bool live, int D, const A (&values)[VEC]) {
    if (live && column(item) < D) store(row + column(item), narrow<T>(values));
}

// Read a parameter for vector `item`; the values beyond the end of the row are unspecified.
DEVICE void read(const A* from, int item, int D, A (&out)[VEC]) {
    widen<A, VEC>(load_shared<VEC>(from + (column(item) < D ? column(item) : 0)), out);
}

// Return the sum of v over the threads of a row. The whole block must take part. `turn` alternates
// between two buffers, so that one barrier per row is enough.
DEVICE A sum_row(A v, A* scratch, int& turn) {
    v = sum_lanes<32>(v);
    if (LANES == 32) return v;
    A* parts = scratch + turn * WARPS;
    turn ^= 1;
    if (tid() % 32 == 0) parts[tid() / 32] = v;
    barrier_sync();
    constexpr int WARPS_PER_ROW = LANES / 32;
    A sum = parts[group() * WARPS_PER_ROW];
#pragma unroll
    for (int i = 1; i < WARPS_PER_ROW; ++i) sum += parts[group() * WARPS_PER_ROW + i];
    return sum;
}

// The means of f in a segment: in shared memory, or where that has no space in global memory.
DEVICE void read(global<A> from, int item, int D, A (&out)[VEC]) {
    widen<A, VEC>(load<VEC>(from + (column(item) < D ? column(item) : 0)), out);
}

// Compute one vector of z = x + scale * (f - centre) + shift, without SHIFT of x + scale * f. If
// f is not CENTRED, `shift` includes -scale * centre.
template <typename Means>
DEVICE void merge(const Row& x, const Row& f, const A* scale, Means centre, const A* shift,
                  int item, int D, A (&z)[VEC]) {
    A branch[VEC], s[VEC], means[VEC], more[VEC];
    widen<T, VEC>(x.vectors[item], z);
    widen<T, VEC>(f.vectors[item], branch);
    if (SCALE) read(scale, item, D, s);
    if (SHIFT) read(shift, item, D, more);
    if (SHIFT && CENTRED) read(centre, item, D, means);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        if (SHIFT && CENTRED) branch[j] -= means[j];
        if (SHIFT)
            z[j] = merged(z[j], s[j], branch[j], more[j]);
        else
            z[j] += SCALE ? s[j] * branch[j] : branch[j];
    }
}

struct ForwardOperands {
    global<T> x, f, y;
    global<A> rstd;
    A *scale, *centre, *shift, *weight, *scratch;  // in shared memory
    int D;
    A eps;
};

// Compute rows [begin, end) and, if SUM, add the rounded values of y to `sums`.
template <bool SUM>
DEVICE void forward_rows(const ForwardOperands& operands, i64 begin, i64 end,
                         A (&sums)[ITEMS][VEC]) {
    int D = operands.D, turn = 0;
    for (GroupRows<SUM> rows(begin, end); rows.left(); rows.advance()) {
        i64 r = rows.next;
        bool live = r < rows.end;
        Row x, f;
        load_row(operands.x + r * D, live, D, x);
        load_row(operands.f + r * D, live, D, f);
        A z[ITEMS][VEC];
        Sum<WIDE> squares = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            merge(x, f, operands.scale, operands.centre, operands.shift, i, D, z[i]);
            bool inside = column(i) < D;
#pragma unroll
            for (int j = 0; j < VEC; ++j) squares += inside ? z[i][j] * z[i][j] : 0;
        }
        A mean = sum_row((A)squares, operands.scratch, turn) / D;
        A rstd = reciprocal_root(mean + operands.eps);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            A w[VEC];
            if (WEIGHT) read(operands.weight, i, D, w);
#pragma unroll
            for (int j = 0; j < VEC; ++j) z[i][j] *= WEIGHT ? rstd * w[j] : rstd;
            vec<T, VEC> y = narrow<T>(z[i]);
            if (live && column(i) < D) store(operands.y + r * D + column(i), y);
            if (SUM && live) {
                widen<T, VEC>(y, z[i]);
#pragma unroll
                for (int j = 0; j < VEC; ++j) sums[i][j] += z[i][j];
            }
        }
        if (live && lane() == 0) store_one(operands.rstd + r, rstd);
    }
}

struct BackwardOperands {
    global<T> dy, x, f;  // x: the saved tensor, x or y
    global<A> rstd;
    A *scale, *centre, *shift, *weight, *scratch;  // in shared memory
    int D;
};

// Compute dz of row r, load its f, add to dweight and return mean_d(g * n).
DEVICE A backward_row(const BackwardOperands& operands, i64 r, bool live, int& turn, Row& f,
                      A (&dz)[ITEMS][VEC], A (&dweight)[ITEMS][VEC]) {
    int D = operands.D;
    Row dy, x;
    load_row(operands.dy + r * D, live, D, dy);
    load_row(operands.x + r * D, live, D, x);
    if (BRANCH || SCALE) load_row(operands.f + r * D, live, D, f);
    A rstd = live ? load_one(operands.rstd + r) : 0;
    A n[ITEMS][VEC];
    Sum<WIDE> product = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        widen<T, VEC>(dy.vectors[i], dz[i]);
        if (BRANCH)
            merge(x, f, operands.scale, operands.centre, operands.shift, i, D, n[i]);
        else
            widen<T, VEC>(x.vectors[i], n[i]);
        A w[VEC];
        if (WEIGHT) read(operands.weight, i, D, w);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            if (BRANCH) n[i][j] *= rstd;
            if (WEIGHT) {
                dweight[i][j] += dz[i][j] * n[i][j];
                dz[i][j] *= w[j];
            }
            product += dz[i][j] * n[i][j];  // dy is zero beyond the end of the row
        }
    }
    A mean = sum_row((A)product, operands.scratch, turn) / D;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j) dz[i][j] = rstd * (dz[i][j] - n[i][j] * mean);
    return mean;
}

// Add the column sums of the threads over the groups of the block and store one row of D.
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
