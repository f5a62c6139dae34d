// SwiGLU: y = silu(gate) * value, of two tensors, or of the halves of one packed row in any order.
//
//   s = sigmoid(gate)    dvalue = dy * gate * s    dgate = dy * value * s * (1 + gate * (1 - s))
//
// Bytes, in N*F elements: forward 2 read and 1 written, backward 3 and 2, which is the minimum.
// Launch: a flat grid over the vectors of the result, so that no width is padded. A thread
// processes ITEMS vectors at a distance of THREADS, and issues all of their loads before it uses
// the first.
// Preconditions: VEC divides F, the row strides and the offsets; pointers aligned to a vector.
// Deterministic: no sums.
#include <common.cuh>

#ifndef VEC
#define VEC 4
#endif
constexpr int THREADS = 256;
constexpr int ITEMS = 2;

struct Args {
    global<T> gate, value, dy;      // packed: gate and value are the same tensor
    global<T> y, dvalue;            // backward writes dgate to y; packed: y and dvalue are the same
    i64 gate_offset, value_offset;  // elements from the beginning of a row, also of the gradients
    i64 gate_stride, value_stride, dy_stride, y_stride;  // of rows; y_stride also of dvalue
    i64 total, F;  // vectors of the result, elements of its rows
};

struct Sigmoid {
    A value, complement;  // s and 1 - s
};

// For 16-bit rows by approximations. They flush subnormal numbers to zero, and 1 + exp(-v) exceeds
// 2^126 for v < -87: a quarter of it has a normal reciprocal for every v with a finite exp(-v).
// 1 - s is exactly 0 where exp(-v) is, because v may be as large as 2^127.
DEVICE Sigmoid sigmoid(float v) {
    if constexpr (sizeof(T) == 2) {
        float e = ex2_approx_ftz_f32(v * -1.4426950408889634f - 2);  // exp(-v) / 4
        float r = rcp_approx_ftz_f32(0.25f + e), s = 0.25f * r;
        return {s, v > 0 ? e * r : 1 - s};
    }
    float s = 1 / (1 + exp_f32(-v));
    return {s, 1 - s};
}
DEVICE Sigmoid sigmoid(double v) {
    double s = 1 / (1 + exp_f64(-v));
    return {s, 1 - s};
}
// silu(v); the quotient is more accurate than v * s where s is subnormal.
DEVICE float silu(float v) { return sizeof(T) == 2 ? v * sigmoid(v).value : v / (1 + exp_f32(-v)); }
DEVICE double silu(double v) { return v / (1 + exp_f64(-v)); }

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

DEVICE global<T> gate_of(const Args& args) { return args.gate + args.gate_offset; }
DEVICE global<T> value_of(const Args& args) { return args.value + args.value_offset; }

KERNEL(swiglu_fwd, Args, THREADS, 4) {
    vec<T, VEC> gates[ITEMS], values[ITEMS];
    Position positions[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        Position p = positions[i] = position_of(args, i);
        if (!p.live) continue;
        gates[i] = load<VEC>(gate_of(args) + (p.row * args.gate_stride + p.column));
        values[i] = load<VEC>(value_of(args) + (p.row * args.value_stride + p.column));
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        if (!positions[i].live) continue;
        A gate[VEC], value[VEC];
        widen<T, VEC>(gates[i], gate);
        widen<T, VEC>(values[i], value);
#pragma unroll
        for (int j = 0; j < VEC; ++j) value[j] *= silu(gate[j]);
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
        gates[i] = load<VEC>(gate_of(args) + (p.row * args.gate_stride + p.column));
        values[i] = load<VEC>(value_of(args) + (p.row * args.value_stride + p.column));
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
            Sigmoid s = sigmoid(gate[j]);
            A dgate = dy[j] * value[j] * s.value * (1 + gate[j] * s.complement);
            value[j] = dy[j] * (gate[j] * s.value);  // dvalue
            gate[j] = dgate;
        }
        i64 to = positions[i].row * args.y_stride + positions[i].column;
        store(args.y + (args.gate_offset + to), narrow<T>(gate));
        store(args.dvalue + (args.value_offset + to), narrow<T>(value));
    }
}
