// The plain residual with RMSNorm: z = x + scale * f, y = z * rstd * weight; see rows.cuh.
//
//   dx = dz    df = scale * dz    dscale = sum dz * f    dweight = sum dy * n
//
// Bytes, in passes: forward 2 read and 1 written. Backward without parameters 2 and 1: n is y, df
// is dx. With a scale 3 and 2: n comes from x and f, which are read for dscale in any case.
// Launch: `share` rows a block, GROUPS at a time; a block leaves a partial row of dscale and of
// dweight, which sum_rows adds. Shared memory (rows.cuh): a vector each for scale and weight, and
// the sums backward. Preconditions: rows.cuh's.
#include <rows.cuh>
#include <sum_rows.cuh>

struct Args {
    global<T> x, f, y;  // backward: x is what forward kept
    global<T> dy, dx, df;
    global<A> rstd;
    global<A> dscale, dweight;  // (blocks, D)
    Parameter scale, weight;
    i64 N, D, share;
    double eps;
};

DEVICE i64 first_row(const Args& args) { return (i64)ctaid() * args.share; }
DEVICE i64 end_row(const Args& args) {
    i64 end = first_row(args) + args.share;
    return end < args.N ? end : args.N;
}

#if !BACKWARD
KERNEL(residual_fwd, Args, THREADS, RESIDENT) {
    int D = (int)args.D;
    Shared shared(D);
    A *scale = shared.take(SCALE), *weight = shared.take(WEIGHT);
    if (SCALE) stage(args.scale, scale, D);
    if (WEIGHT) stage(args.weight, weight, D);
    barrier_sync();
    Forward at = {args.x,  args.f, args.y,         args.rstd, scale,
                  nullptr, weight, shared.scratch, D,         (A)args.eps};
    A none[ITEMS][VEC];
    forward_rows<false>(at, first_row(args), end_row(args), none);
}

#else
KERNEL(residual_bwd, Args, THREADS, RESIDENT) {
    int D = (int)args.D, turn = 0;
    Shared shared(D);
    A *scale = shared.take(SCALE), *weight = shared.take(WEIGHT);
    if (SCALE) stage(args.scale, scale, D);
    if (WEIGHT) stage(args.weight, weight, D);
    barrier_sync();
    Backward at = {args.dy, args.x, args.f, args.rstd, scale, nullptr, weight, shared.scratch, D};
    A dscale[ITEMS][VEC] = {}, dweight[ITEMS][VEC] = {};
    i64 end = end_row(args);
    for (i64 first = first_row(args); first < end; first += GROUPS) {
        i64 r = first + group();
        bool live = r < end;
        Row f;
        A dz[ITEMS][VEC];
        backward_row(at, r, live, turn, f, dz, dweight);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            store_vector(args.dx + r * D, i, live, D, dz[i]);
            if (!SCALE) continue;
            A branch[VEC], s[VEC];
            widen<T, VEC>(f.at[i], branch);
            read(scale, i, D, s);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                dscale[i][j] += dz[i][j] * branch[j];
                dz[i][j] *= s[j];
            }
            store_vector(args.df + r * D, i, live, D, dz[i]);
        }
    }
    if (SCALE) store_columns(dscale, shared.next, D, args.dscale + (i64)ctaid() * D);
    if (WEIGHT) store_columns(dweight, shared.next, D, args.dweight + (i64)ctaid() * D);
}
#endif
