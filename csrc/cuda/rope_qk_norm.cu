// RoPE, QK-Norm, and both in one pass: rotation of the pairs of a head, RMSNorm over the head.
//
// R rotates a pair (x1, x2) by theta, or by -theta if `conjugate` is set:
//   o1 = x1 cos - x2 sin    o2 = x2 cos + x1 sin    (cos^2 + sin^2 need not be 1)
//
//   rotation first   u = R x              n = u * rstd(u)          y = n * w
//   norm first       n = x * rstd(x)                               y = R (n * w)
//
// Backward, with R^T the transposed rotation and g the gradient of n * w:
//
//   rotation first   g = dy      du = norm'(g * w, n)              dx = R^T du
//   norm first       g = R^T dy                                    dx = norm'(g * w, n)
//   dw = sum g * n   norm'(g, n) = rstd * (g - n * mean(g * n))
//
// With rotation first and no weight n is the result y. Otherwise backward computes n again from the
// input. `x` of a backward kernel is therefore the saved tensor: y or the input.
//
// Bytes, in passes over q and k: forward 1 read and 1 written of each, backward 2 and 1. In
// addition one row of cos and of sin per token, for all heads of q and k, and rstd once.
// Launch: LANES threads per token process its heads BATCH at a time. A thread has ITEMS vectors of
// VEC adjacent elements of the first half and the VEC partners of each (interleaved: 2 VEC adjacent
// elements): 16 bytes of bf16 each. The rotation needs no exchange between threads, the norm
// log2(LANES) shuffles. With a weight a block loops over `tokens_per_block` tokens and leaves one
// row of partial sums of dw (shared memory: warps * D * sizeof(A)), which sum_rows adds.
// Preconditions: VEC divides D / 2 and each stride; VEC = 1 if D is odd; aligned pointers. That
// includes the tables unless GATHER is set, which reads them element by element: any float dtype,
// and any distance from one pair to the next.
// Deterministic: tokens and heads of a block and partial rows are added in a fixed order.
#include <common.cuh>
#include <sum_rows.cuh>

#ifndef VEC
#define VEC 4
#define LANES 8
#define ITEMS 2
#define ROTATE 1
#define NORM 1
#define NORM_FIRST 0
#define INTERLEAVED 0
#define WEIGHT 0
#define GATHER 0
#define LONG 0  // a thread adds more than 2 RUN terms to each sum of dw
#endif
constexpr int THREADS = 128;
constexpr int GROUPS = THREADS / LANES;  // tokens that a block processes at the same time

// q or k; `heads` is 0 if there is no such tensor.
struct Side {
    global<T> x, dy, out;     // out: y, or dx
    global<A> rstd, dweight;  // dweight: (blocks, D)
    Parameter weight;
    i64 heads;
    i64 x_sample, x_token, x_head;
    i64 dy_sample, dy_token, dy_head;
};

enum { FLOAT32, BFLOAT16, FLOAT16, FLOAT64 };  // values of Table::dtype

struct Table {
    u64 address;              // of (samples, tokens, D / 2)
    i64 dtype;                // without GATHER float32 or T
    i64 sample, token, pair;  // strides; 0 for a dimension with the same angles everywhere
};

struct Args {
    Side q, k;
    Table cos, sin;
    i64 tokens_per_sample, tokens, D, tokens_per_block;
    double eps;
    i64 conjugate;  // 1: rotate by -theta
};

struct Pairs {
    A first[ITEMS][VEC], second[ITEMS][VEC];
};
// Pairs in the order of memory: VEC first elements and their VEC partners, or 2 VEC adjacent
// elements.
template <typename E>
struct RawPairs {
    vec<E, VEC> low[ITEMS], high[ITEMS];
};

DEVICE int lane() { return tid() % LANES; }
DEVICE int pair_of(int item) { return (lane() + item * LANES) * VEC; }
DEVICE int half(const Args& args) { return (int)(args.D + 1) / 2; }
DEVICE bool has_pair(const Args& args, int pair) { return pair < half(args); }
// The last pair of an odd head has no second element; such heads have VEC = 1.
DEVICE bool has_second(const Args& args, int pair) {
    return VEC > 1 || pair + half(args) < (int)args.D;
}

// Offsets of the two vectors that hold VEC pairs, the first of which is `pair`.
DEVICE int low_offset(int pair) { return INTERLEAVED ? 2 * pair : pair; }
DEVICE int high_offset(const Args& args, int pair) {
    return INTERLEAVED ? 2 * pair + VEC : pair + half(args);
}

template <typename E>
DEVICE void load_pairs(const Args& args, global<E> row, bool live, RawPairs<E>& raw) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        int pair = pair_of(i);
        raw.low[i] = raw.high[i] = {};
        if (!live || !has_pair(args, pair)) continue;
        raw.low[i] = load<VEC>(row + low_offset(pair));
        if (has_second(args, pair)) raw.high[i] = load<VEC>(row + high_offset(args, pair));
    }
}

template <typename E>
DEVICE void widen(const RawPairs<E>& raw, Pairs& p) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        A low[VEC], high[VEC];
        widen<E, VEC>(raw.low[i], low);
        widen<E, VEC>(raw.high[i], high);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            int a = 2 * j, b = 2 * j + 1;  // indices of an interleaved pair in [low, high]
            p.first[i][j] = !INTERLEAVED ? low[j] : a < VEC ? low[a % VEC] : high[a % VEC];
            p.second[i][j] = !INTERLEAVED ? high[j] : b < VEC ? low[b % VEC] : high[b % VEC];
        }
    }
}

DEVICE void store_pairs(const Args& args, global<T> row, bool live, const Pairs& p) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        int pair = pair_of(i);
        if (!live || !has_pair(args, pair)) continue;
        A low[VEC], high[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const A(&even)[VEC] = p.first[i], (&odd)[VEC] = p.second[i];
            int a = j / 2, b = (j + VEC) / 2;  // the pairs of elements j and j + VEC
            low[j] = !INTERLEAVED ? even[j] : j % 2 ? odd[a] : even[a];
            high[j] = !INTERLEAVED ? odd[j] : (j + VEC) % 2 ? odd[b] : even[b];
        }
        store(row + low_offset(pair), narrow<T>(low));
        if (has_second(args, pair)) store(row + high_offset(args, pair), narrow<T>(high));
    }
}

DEVICE void load_weight(const Args& args, const Parameter& weight, Pairs& p) {
    if (weight.narrow) {
        RawPairs<T> raw;
        load_pairs(args, global<T>{weight.address}, true, raw);
        widen(raw, p);
    } else {
        RawPairs<float> raw;
        load_pairs(args, global<float>{weight.address}, true, raw);
        widen(raw, p);
    }
}

struct Token {
    i64 n, sample, t;
    bool live;
};

DEVICE Token token_at(const Args& args, i64 n, i64 end) {
    return {n, n / args.tokens_per_sample, n % args.tokens_per_sample, n < end};
}

DEVICE A gather(const Table& table, i64 index) {
    if (table.dtype == FLOAT64) return (A)load_one(global<double>{table.address} + index);
    if (table.dtype == FLOAT32) return (A)load_one(global<float>{table.address} + index);
    u16 bits = ld_global_nc_b16((global<float16>{table.address} + index).address);
    return table.dtype == FLOAT16 ? cvt_f32_f16(bits) : mov_f32((u32)bits << 16);
}

DEVICE void load_table(const Table& table, const Token& token, int pair, bool live, A (&out)[VEC]) {
    i64 row = token.sample * table.sample + token.t * table.token;
    if (!GATHER) {
        load_parameter<VEC>({table.address, table.dtype}, row + pair, live, out);
        return;
    }
#pragma unroll
    for (int j = 0; j < VEC; ++j) out[j] = live ? gather(table, row + (pair + j) * table.pair) : 0;
}

// Load cos into `first` and sin, negated if `conjugate`, into `second`.
DEVICE void load_angles(const Args& args, const Token& token, Pairs& angles) {
    if (!ROTATE) return;
    A sign = args.conjugate ? -1 : 1;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        bool live = token.live && has_pair(args, pair_of(i));
        load_table(args.cos, token, pair_of(i), live, angles.first[i]);
        load_table(args.sin, token, pair_of(i), live, angles.second[i]);
#pragma unroll
        for (int j = 0; j < VEC; ++j) angles.second[i][j] *= sign;
    }
}

// Multiplie by R if `direction` is 1, by its transpose if it is -1.
template <int direction>
DEVICE void rotate(const Pairs& angles, Pairs& p) {
    if (!ROTATE) return;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            A c = angles.first[i][j], s = direction * angles.second[i][j];
            A x1 = p.first[i][j], x2 = p.second[i][j];
            p.first[i][j] = x1 * c - x2 * s;
            p.second[i][j] = x2 * c + x1 * s;
        }
}

DEVICE void scale(Pairs& p, A factor) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            p.first[i][j] *= factor;
            p.second[i][j] *= factor;
        }
}

DEVICE void multiply(Pairs& p, const Pairs& factors) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            p.first[i][j] *= factors.first[i][j];
            p.second[i][j] *= factors.second[i][j];
        }
}

// Return the sum of a * b over the head, on each of its lanes.
DEVICE A inner_product(const Pairs& a, const Pairs& b) {
    Sum<(ITEMS * VEC > RUN)> sum = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
        for (int j = 0; j < VEC; ++j)
            sum += a.first[i][j] * b.first[i][j] + a.second[i][j] * b.second[i][j];
    }
    return sum_lanes<LANES>((A)sum);
}

template <bool WEIGHTED>
DEVICE void forward(const Args& args, const Side& side, const Token& token, const Pairs& angles) {
    constexpr int BATCH = 4;
    Pairs weight;
    if (WEIGHTED) load_weight(args, side.weight, weight);
    int heads = (int)side.heads;
    global<T> x = side.x + token.sample * side.x_sample + token.t * side.x_token;
    global<T> y = side.out + token.n * heads * args.D;
    A lane_rstd = 0;  // rstd of head `lane` of each LANES heads, which are stored together
    for (int first = 0; first < heads; first += BATCH) {
        RawPairs<T> raw[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            int h = first + b;
            load_pairs(args, x + h * side.x_head, token.live && h < heads, raw[b]);
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            int h = first + b;
            Pairs p;
            widen(raw[b], p);
            if (!NORM_FIRST) rotate<1>(angles, p);
            if (NORM) {
                A rstd = reciprocal_root(inner_product(p, p) / (A)args.D + (A)args.eps);
                scale(p, rstd);
                if (h % LANES == lane()) lane_rstd = rstd;
                if (h < heads && (h % LANES == LANES - 1 || h == heads - 1)) {
                    int head = h - h % LANES + lane();
                    if (token.live && head <= h)
                        store_one(side.rstd + token.n * heads + head, lane_rstd);
                }
            }
            if (WEIGHTED) multiply(p, weight);
            if (NORM_FIRST) rotate<1>(angles, p);
            store_pairs(args, y + h * args.D, token.live && h < heads, p);
        }
    }
}

using WeightSum = Sum<LONG || (sizeof(T) > 2)>;
struct WeightSums {
    WeightSum first[ITEMS][VEC], second[ITEMS][VEC];
};

template <bool WEIGHTED>
DEVICE void backward(const Args& args, const Side& side, const Token& token, const Pairs& angles,
                     WeightSums& dweight) {
    constexpr int BATCH = 2;
    Pairs weight;
    if (WEIGHTED) load_weight(args, side.weight, weight);
    int heads = (int)side.heads;
    global<T> dy = side.dy + token.sample * side.dy_sample + token.t * side.dy_token;
    global<T> x = side.x + token.sample * side.x_sample + token.t * side.x_token;
    global<T> dx = side.out + token.n * heads * args.D;
    A lane_rstd = 0;  // rstd of head `lane` of each LANES heads
    for (int first = 0; first < heads; first += BATCH) {
        if (first % LANES == 0 && token.live && first + lane() < heads)
            lane_rstd = load_one(side.rstd + token.n * heads + first + lane());
        RawPairs<T> raw_dy[BATCH], raw_x[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            int h = first + b;
            bool live = token.live && h < heads;
            load_pairs(args, dy + h * side.dy_head, live, raw_dy[b]);
            load_pairs(args, x + h * side.x_head, live, raw_x[b]);
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            int h = first + b;
            A rstd = shuffle_from(lane_rstd, (tid() % 32) / LANES * LANES + h % LANES);
            Pairs g, n;
            widen(raw_dy[b], g);
            widen(raw_x[b], n);
            if (NORM_FIRST) rotate<-1>(angles, g);
            if (NORM_FIRST || WEIGHTED) {
                if (!NORM_FIRST) rotate<1>(angles, n);
                scale(n, rstd);
            }
            if (WEIGHTED) {
#pragma unroll
                for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                    for (int j = 0; j < VEC; ++j) {  // zero if there is no such head
                        dweight.first[i][j] += g.first[i][j] * n.first[i][j];
                        dweight.second[i][j] += g.second[i][j] * n.second[i][j];
                    }
                multiply(g, weight);
            }
            A mean = inner_product(g, n) / (A)args.D;
#pragma unroll
            for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                for (int j = 0; j < VEC; ++j) {
                    g.first[i][j] = rstd * (g.first[i][j] - n.first[i][j] * mean);
                    g.second[i][j] = rstd * (g.second[i][j] - n.second[i][j] * mean);
                }
            if (!NORM_FIRST) rotate<-1>(angles, g);
            store_pairs(args, dx + h * args.D, token.live && h < heads, g);
        }
    }
}

// Store the sum of dw over the tokens and heads of this block, one partial row.
DEVICE void store_dweight(const Args& args, const Side& side, const WeightSums& dweight) {
    A* parts = (A*)dynamic_shared();  // [warps][D]
    int D = (int)args.D, warp = tid() / 32;
    barrier_sync();
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            A first = (A)sum_lanes<32 / LANES>(dweight.first[i][j], LANES);
            A second = (A)sum_lanes<32 / LANES>(dweight.second[i][j], LANES);
            int pair = pair_of(i);
            if (tid() % 32 >= LANES || !has_pair(args, pair)) continue;
            int d = INTERLEAVED ? 2 * (pair + j) : pair + j;
            parts[warp * D + d] = first;
            if (has_second(args, pair))
                parts[warp * D + (INTERLEAVED ? d + 1 : d + half(args))] = second;
        }
    barrier_sync();
    for (int d = tid(); d < D; d += THREADS) {
        A sum = parts[d];
        for (int w = 1; w < THREADS / 32; ++w) sum += parts[w * D + d];
        store_one(side.dweight + (i64)ctaid() * D + d, sum);
    }
}

KERNEL(heads_fwd, Args, THREADS, WEIGHT ? 3 : 4) {
    i64 begin = (i64)ctaid() * args.tokens_per_block;
    i64 end = begin + args.tokens_per_block;
    end = end < args.tokens ? end : args.tokens;
    for (i64 first = begin; first < end; first += GROUPS) {
        Token token = token_at(args, first + tid() / LANES, end);
        Pairs angles;
        load_angles(args, token, angles);
        if (WEIGHT && args.q.weight)
            forward<WEIGHT>(args, args.q, token, angles);
        else
            forward<false>(args, args.q, token, angles);
        if (WEIGHT && args.k.weight)
            forward<WEIGHT>(args, args.k, token, angles);
        else
            forward<false>(args, args.k, token, angles);
    }
}

#if NORM
KERNEL(heads_bwd, Args, THREADS, WEIGHT ? 3 : 4) {
    i64 begin = (i64)ctaid() * args.tokens_per_block;
    i64 end = begin + args.tokens_per_block;
    end = end < args.tokens ? end : args.tokens;
    WeightSums dq_weight = {}, dk_weight = {};
    for (i64 first = begin; first < end; first += GROUPS) {
        Token token = token_at(args, first + tid() / LANES, end);
        Pairs angles;
        load_angles(args, token, angles);
        if (WEIGHT && args.q.weight)
            backward<WEIGHT>(args, args.q, token, angles, dq_weight);
        else
            backward<false>(args, args.q, token, angles, dq_weight);
        if (WEIGHT && args.k.weight)
            backward<WEIGHT>(args, args.k, token, angles, dk_weight);
        else
            backward<false>(args, args.k, token, angles, dk_weight);
    }
    if (WEIGHT && args.q.weight) store_dweight(args, args.q, dq_weight);
    if (WEIGHT && args.k.weight) store_dweight(args, args.k, dk_weight);
}
#endif
