// Element types, vectors, parameters and sums over lanes, shared by all kernels.
#pragma once
#include <ptx.cuh>

struct bfloat16 {
    u16 bits;
};
struct float16 {
    u16 bits;
};
template <typename E>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<bfloat16> = true;

#ifndef DTYPE  // of the activations; the launcher sets bfloat16, float16, float or double
#define DTYPE float
#endif
using T = DTYPE;

template <typename E>
struct accumulator {
    using type = float;
};
template <>
struct accumulator<double> {
    using type = double;
};
using A = accumulator<T>::type;  // dtype of arithmetic, sums and statistics

// Values need not average out: the error of a plain sum of n equal terms is up to n / 4 roundings.
// Sums of more than about 2 RUN terms are therefore added in double, or in runs of RUN terms whose
// sums are added in double.
constexpr int RUN = 16;
// Whether a merge subtracts the means of f from f. For 16-bit rows they are part of one vector per
// segment, which saves registers: the rounding of a row is larger than the error of the difference.
constexpr bool CENTRED = sizeof(T) > 2;

// x + scale * f + shift, where f is centred or `shift` includes -scale * jf. The two terms that may
// almost cancel are added first, without a rounding in between.
DEVICE A merged(A x, A scale, A f, A shift) {
    return CENTRED ? x + scale * f + shift : x + (scale * f + shift);
}
template <bool many>
struct sum_type {
    using type = A;
};
template <>
struct sum_type<true> {
    using type = double;
};
template <bool many>
using Sum = typename sum_type<many>::type;

// An address in global memory, accessed only by load() and store(). 0 means that there is no
// tensor.
template <typename E>
struct global {
    u64 address;
    DEVICE explicit operator bool() const { return address != 0; }
    DEVICE global operator+(i64 elements) const { return {address + elements * (i64)sizeof(E)}; }
};

// ---- Vectors, stored as words of 32 bits ----
template <int BYTES>
struct alignas(BYTES < 16 ? BYTES : 16) words {
    u32 word[BYTES / 4];
};
template <>
struct words<2> {
    u16 word[1];
};
template <typename E, int N>
using vec = words<sizeof(E) * N>;  // N adjacent elements

template <typename To, typename From>
DEVICE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

template <int N, typename E>
DEVICE vec<E, N> load(global<E> p) {
    constexpr int BYTES = sizeof(E) * N;
    vec<E, N> v;
    if constexpr (BYTES == 2) v.word[0] = ld_global_nc_b16(p.address);
    if constexpr (BYTES == 4) v.word[0] = ld_global_nc_b32(p.address);
    if constexpr (BYTES == 8) v = bit_cast<vec<E, N>>(ld_global_nc_b64(p.address));
    if constexpr (BYTES >= 16) {
#pragma unroll
        for (int i = 0; i < BYTES / 16; ++i) {
            b128 part = ld_global_nc_v4_b32(p.address + 16 * i);
            v.word[4 * i] = part.x, v.word[4 * i + 1] = part.y;
            v.word[4 * i + 2] = part.z, v.word[4 * i + 3] = part.w;
        }
    }
    return v;
}

template <typename E, int BYTES>
DEVICE void store(global<E> p, const words<BYTES>& v) {
    if constexpr (BYTES == 2) st_global_b16(p.address, v.word[0]);
    if constexpr (BYTES == 4) st_global_b32(p.address, v.word[0]);
    if constexpr (BYTES == 8) st_global_b64(p.address, bit_cast<u64>(v));
    if constexpr (BYTES >= 16) {
#pragma unroll
        for (int i = 0; i < BYTES / 16; ++i)
            st_global_v4_b32(p.address + 16 * i, {v.word[4 * i], v.word[4 * i + 1],
                                                  v.word[4 * i + 2], v.word[4 * i + 3]});
    }
}

// Shared memory. The vector is passed by value, so that it stays a single access.
template <int N, typename E>
DEVICE vec<E, N> load_shared(const E* p) {
    return *(const vec<E, N>*)p;
}
template <typename E, int BYTES>
DEVICE void store_shared(E* p, const words<BYTES>& v) {
    *(words<BYTES>*)p = v;
}

DEVICE float load_one(global<float> p) { return mov_f32(ld_global_nc_b32(p.address)); }
DEVICE double load_one(global<double> p) { return mov_f64(ld_global_nc_b64(p.address)); }
DEVICE void store_one(global<float> p, float v) { st_global_b32(p.address, mov_b32(v)); }
DEVICE void store_one(global<double> p, double v) { st_global_b64(p.address, mov_b64(v)); }

// ---- Conversion to and from the dtype of arithmetic ----
template <typename E, int BYTES>
DEVICE A element(const words<BYTES>& v, int i) {
    if constexpr (sizeof(E) == 8) return (A)mov_f64((u64)v.word[2 * i + 1] << 32 | v.word[2 * i]);
    if constexpr (sizeof(E) == 4) return mov_f32(v.word[i]);
    if constexpr (sizeof(E) == 2) {
        u32 word = v.word[i / 2];
        if constexpr (is_bfloat16<E>) return mov_f32(i % 2 ? word & 0xffff0000 : word << 16);
        return cvt_f32_f16((u16)(i % 2 ? word >> 16 : word));
    }
}

template <typename E, int N>
DEVICE void widen(const vec<E, N>& v, A (&out)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = element<E>(v, i);
}

template <typename E>
DEVICE u32 narrow_pair(float high, float low) {
    return is_bfloat16<E> ? cvt_rn_bf16x2_f32(high, low) : cvt_rn_f16x2_f32(high, low);
}

// Round to the nearest value of E, ties to even.
template <typename E, int N>
DEVICE vec<E, N> narrow(const A (&in)[N]) {
    vec<E, N> v;
    if constexpr (sizeof(E) == 2 && N == 1) v.word[0] = (u16)narrow_pair<E>(0, in[0]);
    if constexpr (sizeof(E) == 2 && N > 1) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) v.word[i] = narrow_pair<E>(in[2 * i + 1], in[2 * i]);
    }
    if constexpr (sizeof(E) > 2) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if constexpr (sizeof(E) == 4) v.word[i] = mov_b32((float)in[i]);
            if constexpr (sizeof(E) == 8) {
                v.word[2 * i] = (u32)mov_b64(in[i]);
                v.word[2 * i + 1] = (u32)(mov_b64(in[i]) >> 32);
            }
        }
    }
    return v;
}

// ---- Parameters, in float32 or the dtype of the activations ----
struct Parameter {
    u64 address;
    i64 narrow;  // 1: elements of type T; 0: float32
    DEVICE explicit operator bool() const { return address != 0; }
};

// Load N adjacent values, the first at index `first`; zeros unless `live`.
template <int N>
DEVICE void load_parameter(const Parameter& p, i64 first, bool live, A (&out)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = 0;
    if (!live) return;
    if (p.narrow) {
        widen<T, N>(load<N>(global<T>{p.address} + first), out);
    } else {
        widen<float, N>(load<N>(global<float>{p.address} + first), out);
    }
}

// ---- Sums over lanes; every lane gets the same bits ----
DEVICE float shuffle_xor(float v, int lanes) {
    return mov_f32(shfl_sync_bfly_b32(mov_b32(v), lanes));
}
DEVICE double shuffle_xor(double v, int lanes) {
    u64 bits = mov_b64(v);
    u64 low = shfl_sync_bfly_b32((u32)bits, lanes);
    u64 high = shfl_sync_bfly_b32((u32)(bits >> 32), lanes);
    return mov_f64(high << 32 | low);
}
DEVICE float shuffle_from(float v, int lane) {
    return mov_f32(shfl_sync_idx_b32(mov_b32(v), lane));
}
DEVICE double shuffle_from(double v, int lane) {
    u64 bits = mov_b64(v);
    u64 low = shfl_sync_idx_b32((u32)bits, lane);
    u64 high = shfl_sync_idx_b32((u32)(bits >> 32), lane);
    return mov_f64(high << 32 | low);
}

// Sum over `count` lanes whose indices differ by `step`.
template <int count, typename V>
DEVICE V sum_lanes(V v, int step = 1) {
#pragma unroll
    for (int d = count / 2; d > 0; d /= 2) v += shuffle_xor(v, d * step);
    return v;
}

// Add `count` values that are `step` elements apart; the loads of a run are in flight at once.
DEVICE A sum_strided(global<A> from, i64 count, i64 step) {
    double total = 0;
    for (; count > 0; count -= RUN, from = from + RUN * step) {
        A values[RUN], run = 0;
#pragma unroll
        for (int k = 0; k < RUN; ++k) values[k] = k < count ? load_one(from + k * step) : 0;
#pragma unroll
        for (int k = 0; k < RUN; ++k) run += values[k];
        total += run;
    }
    return (A)total;
}

// The approximation is enough for 16-bit rows, which round away the last bits of a float32.
DEVICE float reciprocal_root(float v) {
    return sizeof(T) == 2 ? rsqrt_approx_f32(v) : rsqrt_rn_f32(v);
}
DEVICE double reciprocal_root(double v) { return rsqrt_f64(v); }

template <typename N>
DEVICE N ceil_div(N a, N b) {
    return (a + b - 1) / b;
}
