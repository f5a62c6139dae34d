// SwiGLU: y = silu(gate) * value, with x = [gate, value] packed in a row.
//
//   s = sigmoid(gate)    dvalue = dy * gate * s    dgate = dy * value * s * (1 + gate * (1 - s))
//
// Bytes, in N*F elements: forward 2 read and 1 written, backward 3 and 2, which is the minimum.
// Launch: a flat grid over the vectors of the result, so that no width is padded. A thread
// processes ITEMS vectors at a distance of THREADS, and issues all of their loads before it uses
// the first.
// Preconditions: VEC divides F and the row strides of x, y and dy; pointers aligned to a vector.
// Deterministic: no sums.
#include <common.cuh>

#ifndef VEC
#define VEC 4
#endif
constexpr int THREADS = 256;
constexpr int ITEMS = 2;

struct Args {
    global<T> x, dy, y;  // backward writes dx to y
    i64 total;           // vectors of the result
    i64 F, x_stride, dy_stride, y_stride;
};

DEVICE float sigmoid(float v) {
    if constexpr (sizeof(T) == 2)
        return rcp_approx_f32(1 + ex2_approx_f32(v * -1.4426950408889634f));
    return 1 / (1 + exp_f32(-v));
}
DEVICE double sigmoid(double v) { return 1 / (1 + exp_f64(-v)); }

struct Position {
    i64 row, column;
    bool live;
};

// Position of a vector of this thread. Only the first row of a block needs a 64-bit division.
DEVICE Position position_of(const Args& args, int item) {
    u32 per_row = (u32)(args.F / VEC);
    i64 start = (i64)ctaid() * (THREADS * ITEMS);
    i64 row = start / per_row;
    u32 within = (u32)(start - row * per_row) + tid() + item * THREADS;
    bool live = start + tid() + item * THREADS < args.total;
    return {row + within / per_row, (i64)(within % per_row) * VEC, live};
}

KERNEL(swiglu_fwd, Args, THREADS, 4) {
    vec<T, VEC> gates[ITEMS], values[ITEMS];
    Position positions[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        Position p = positions[i] = position_of(args, i);
        if (!p.live) continue;
        global<T> x = args.x + p.row * args.x_stride + p.column;
        gates[i] = load<VEC>(x);
        values[i] = load<VEC>(x + args.F);
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        if (!positions[i].live) continue;
        A gate[VEC], value[VEC];
        widen<T, VEC>(gates[i], gate);
        widen<T, VEC>(values[i], value);
#pragma unroll
        for (int j = 0; j < VEC; ++j) value[j] *= gate[j] * sigmoid(gate[j]);
        store(args.y + positions[i].row * args.y_stride + positions[i].column, narrow<T>(value));
    }
}

KERNEL(swiglu_bwd, Args, THREADS, 3) {
    vec<T, VEC> gates[ITEMS], values[ITEMS], dys[ITEMS];
    Position positions[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        Position p = positions[i] = position_of(args, i);
        if (!p.live) continue;
        global<T> x = args.x + p.row * args.x_stride + p.column;
        gates[i] = load<VEC>(x);
        values[i] = load<VEC>(x + args.F);
        dys[i] = load<VEC>(args.dy + p.row * args.dy_stride + p.column);
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        if (!positions[i].live) continue;
        A gate[VEC], value[VEC], dy[VEC];
        widen<T, VEC>(gates[i], gate);
        widen<T, VEC>(values[i], value);
        widen<T, VEC>(dys[i], dy);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            A s = sigmoid(gate[j]);
            A dgate = dy[j] * value[j] * s * (1 + gate[j] * (1 - s));
            value[j] = dy[j] * gate[j] * s;  // dvalue
            gate[j] = dgate;
        }
        global<T> dx = args.y + positions[i].row * args.y_stride + positions[i].column;
        store(dx, narrow<T>(gate));
        store(dx + args.F, narrow<T>(value));
    }
}
