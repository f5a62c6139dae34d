// Plain residual with RMSNorm: z = x + scale * f, y = z * rstd * weight; rows.cuh has the rest.
//
//   dx = dz    df = scale * dz    dscale = sum dz * f    dweight = sum dy * n
//
// Bytes, in passes of (B, T, D): forward 2 read and 1 written. Backward without parameters 2 and 1,
// because n is y and df is dx; with only a weight 3 and 1; with a scale 3 and 2, where n is
// computed from x and f, since dscale needs f in any case.
// Launch: blocks of `share` rows, GROUPS at a time. A block leaves one partial row of dscale and of
// dweight, which sum_rows adds. Shared memory (rows.cuh): one vector each for scale and weight, and
// the sums in backward. Preconditions: as in rows.cuh.
// Deterministic: rows of a block and partial rows are added in a fixed order.
#include <rows.cuh>
#include <sum_rows.cuh>

struct Args {
    global<T> x, f, y;  // backward: x is the saved tensor, x or y
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
    A *scale = shared.allocate(SCALE), *weight = shared.allocate(WEIGHT);
    if (SCALE) stage(args.scale, scale, D);
    if (WEIGHT) stage(args.weight, weight, D);
    barrier_sync();
    ForwardOperands operands = {args.x,  args.f, args.y,         args.rstd, scale,      nullptr,
                                nullptr, weight, shared.scratch, D,         (A)args.eps};
    A unused[ITEMS][VEC];
    forward_rows<false>(operands, first_row(args), end_row(args), unused);
}

#else
KERNEL(residual_bwd, Args, THREADS, RESIDENT) {
    int D = (int)args.D, turn = 0;
    Shared shared(D);
    A *scale = shared.allocate(SCALE), *weight = shared.allocate(WEIGHT);
    if (SCALE) stage(args.scale, scale, D);
    if (WEIGHT) stage(args.weight, weight, D);
    barrier_sync();
    BackwardOperands operands = {args.dy, args.x,  args.f, args.rstd,      scale,
                                 nullptr, nullptr, weight, shared.scratch, D};
    A dscale[ITEMS][VEC] = {}, dweight[ITEMS][VEC] = {};
    GroupRows<SCALE || WEIGHT> rows(first_row(args), end_row(args));
    for (; rows.left(); rows.advance()) {
        i64 r = rows.next;
        bool live = r < rows.end;
        Row f;
        A dz[ITEMS][VEC];
        backward_row(operands, r, live, turn, f, dz, dweight);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            store_vector(args.dx + r * D, i, live, D, dz[i]);
            if (!SCALE) continue;
            A branch[VEC], s[VEC];
            widen<T, VEC>(f.vectors[i], branch);
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
