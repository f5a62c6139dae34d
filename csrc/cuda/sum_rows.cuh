// sums[o][d] = sum_r partials[o][r][d]: the last step of each parameter gradient.
//
// Bytes: the partial rows are read once and the sums written once.
// Launch: outputs * ceil(width / 32) blocks of 256 threads. A block sums 32 columns (128 bytes of
// float32) of 8 rows at a time; the 8 sums of a column are added in shared memory
// (256 * sizeof(A) bytes). Deterministic: the order of each sum is fixed.
#pragma once
#include <common.cuh>

constexpr int SUM_COLUMNS = 32, SUM_THREADS = 256, SUM_ROWS = SUM_THREADS / SUM_COLUMNS;

struct SumArgs {
    global<A> partials;  // (outputs, rows, width)
    global<A> sums[3];   // (width,) each
    i64 rows, width;
};

KERNEL(sum_rows, SumArgs, SUM_THREADS, 4) {
    u32 slices = (u32)ceil_div<i64>(args.width, SUM_COLUMNS);
    u32 output = ctaid() / slices, column = tid() % SUM_COLUMNS, group = tid() / SUM_COLUMNS;
    i64 d = (i64)(ctaid() % slices) * SUM_COLUMNS + column;
    bool live = d < args.width;
    global<A> from = args.partials + output * args.rows * args.width + d;
    A total = 0;
    i64 count = ceil_div<i64>(args.rows - group, SUM_ROWS);
    if (live) total = sum_strided(from + group * args.width, count, SUM_ROWS * args.width);
    A* parts = (A*)dynamic_shared();
    parts[tid()] = total;
    barrier_sync();
    if (group || !live) return;
#pragma unroll
    for (int i = 1; i < SUM_ROWS; ++i) total += parts[i * SUM_COLUMNS + column];
    store_one((output == 0 ? args.sums[0] : output == 1 ? args.sums[1] : args.sums[2]) + d, total);
}
