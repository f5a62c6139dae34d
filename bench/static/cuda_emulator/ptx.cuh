// csrc/cuda/ptx.cuh for a CPU: the same functions, by means of the engine or plain C++.
#pragma once
#include <cmath>
#include <cstring>

#include "engine.h"

#define DEVICE inline
#define KERNEL(name, Args, threads, resident)                                                \
    static void name##_body(const Args& args);                                               \
    extern "C" void name(const void* args) { name##_body(*static_cast<const Args*>(args)); } \
    extern "C" const unsigned name##_args_bytes = sizeof(Args);                              \
    extern "C" const unsigned name##_most_threads = threads;                                 \
    static void name##_body(const Args& args)

using u16 = unsigned short;
using u32 = simt::u32;
using u64 = simt::u64;
using i64 = long long;

struct b128 {
    u32 x, y, z, w;
};

namespace simt {
template <typename V>
V bits_of(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <typename V>
V read(u64 at, const char* instruction) {
    return bits_of<V>(reads(at, sizeof(V), instruction));
}
template <typename V>
void write(u64 at, V v, const char* instruction) {
    memcpy(writes(at, sizeof v, instruction), &v, sizeof v);
}
}  // namespace simt

DEVICE u32 tid() { return simt::here().thread; }
DEVICE u32 ctaid() { return simt::here().block; }
DEVICE u32 nctaid() { return simt::here().blocks; }

DEVICE u16 ld_global_nc_b16(u64 at) { return simt::read<u16>(at, "ld.global.nc.b16"); }
DEVICE u32 ld_global_nc_b32(u64 at) { return simt::read<u32>(at, "ld.global.nc.b32"); }
DEVICE u64 ld_global_nc_b64(u64 at) { return simt::read<u64>(at, "ld.global.nc.b64"); }
DEVICE b128 ld_global_nc_v4_b32(u64 at) { return simt::read<b128>(at, "ld.global.nc.v4.b32"); }
DEVICE void st_global_b16(u64 at, u16 v) { simt::write(at, v, "st.global.b16"); }
DEVICE void st_global_b32(u64 at, u32 v) { simt::write(at, v, "st.global.b32"); }
DEVICE void st_global_b64(u64 at, u64 v) { simt::write(at, v, "st.global.b64"); }
DEVICE void st_global_v4_b32(u64 at, b128 v) { simt::write(at, v, "st.global.v4.b32"); }

DEVICE float mov_f32(u32 bits) { return simt::bits_of<float>(&bits); }
DEVICE u32 mov_b32(float v) { return simt::bits_of<u32>(&v); }
DEVICE double mov_f64(u64 bits) { return simt::bits_of<double>(&bits); }
DEVICE u64 mov_b64(double v) { return simt::bits_of<u64>(&v); }

// Round to nearest, ties to even.
DEVICE u32 to_bf16(float v) {
    u32 bits = mov_b32(v);
    if (v != v) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 to_f16(float v) {
    u32 sign = mov_b32(v) >> 16 & 0x8000;
    float size = std::fabs(v);
    if (v != v) return 0x7fff;
    if (size >= 65520) return sign | 0x7c00;
    if (size == 0) return sign;
    int exponent;
    std::frexp(size, &exponent);                 // size < 2^exponent
    exponent = exponent < -13 ? -13 : exponent;  // subnormal below 2^-14
    u32 steps = (u32)std::nearbyint(std::ldexp(size, 11 - exponent));
    return sign | (steps + ((u32)(exponent + 13) << 10));  // a carry moves into the exponent
}
DEVICE float cvt_f32_f16(u16 bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                 : exponent == 0 ? std::ldexp((float)fraction, -24)
                                 : std::ldexp((float)(fraction + 1024), exponent - 25);
    return bits & 0x8000 ? -size : size;
}
DEVICE u32 cvt_rn_bf16x2_f32(float high, float low) { return to_bf16(high) << 16 | to_bf16(low); }
DEVICE u32 cvt_rn_f16x2_f32(float high, float low) { return to_f16(high) << 16 | to_f16(low); }
// .ftz flushes subnormal inputs and results to zero, with their sign.
DEVICE float ftz(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }
DEVICE float ex2_approx_ftz_f32(float v) { return ftz(std::exp2(ftz(v))); }
DEVICE float rcp_approx_ftz_f32(float v) { return ftz(1 / ftz(v)); }
DEVICE float exp_f32(float v) { return std::exp(v); }
DEVICE double exp_f64(double v) { return std::exp(v); }
DEVICE float rsqrt_approx_f32(float v) { return 1 / std::sqrt(v); }
DEVICE float rsqrt_rn_f32(float v) { return (float)(1 / std::sqrt((double)v)); }
DEVICE double rsqrt_f64(double v) { return 1 / std::sqrt(v); }

DEVICE u32 shfl_sync_bfly_b32(u32 v, u32 lanes) { return simt::exchange(v, (tid() ^ lanes) & 31); }
DEVICE u32 shfl_sync_idx_b32(u32 v, u32 lane) { return simt::exchange(v, lane & 31); }
DEVICE void barrier_sync() { simt::block_barrier(); }
DEVICE char* dynamic_shared() { return simt::shared(); }

#if __CUDA_ARCH__ >= 900
DEVICE u32 cluster_ctarank() { return simt::here().rank; }
DEVICE u32 cluster_nctarank() { return simt::here().ranks; }
DEVICE void barrier_cluster_arrive_release() { simt::cluster_arrive(); }
DEVICE void barrier_cluster_wait_acquire() { simt::cluster_wait(); }
// A 32-bit address in the shared memory of a cluster is the offset from this block's.
DEVICE u32 mapa_shared_cluster(const void* p, u32 rank) {
    return (u32)(simt::shared_of(p, rank) - simt::shared());
}
DEVICE u32 ld_shared_cluster_b32(u32 at) {
    const char* p = simt::shared() + (int)at;
    return simt::bits_of<u32>(simt::remote(p, 4, "ld.shared::cluster.b32"));
}
DEVICE u64 ld_shared_cluster_b64(u32 at) {
    const char* p = simt::shared() + (int)at;
    return simt::bits_of<u64>(simt::remote(p, 8, "ld.shared::cluster.b64"));
}
DEVICE void st_shared_cluster_b32(u32 at, u32 v) {
    char* p = simt::shared() + (int)at;
    simt::remote(p, 4, "st.shared::cluster.b32");
    memcpy(p, &v, 4);
}
DEVICE void st_shared_cluster_b64(u32 at, u64 v) {
    char* p = simt::shared() + (int)at;
    simt::remote(p, 8, "st.shared::cluster.b64");
    memcpy(p, &v, 8);
}
DEVICE void mbarrier_init(u64* barrier, u32 arrivals) { simt::mbarrier_init(barrier, arrivals); }
DEVICE void fence_mbarrier_init() {}
DEVICE void fence_proxy_async_shared_cta() {}
DEVICE void mbarrier_arrive_expect_tx(u64* barrier, u32 bytes) {
    simt::mbarrier_arrive(barrier, bytes);
}
DEVICE bool mbarrier_try_wait_parity(u64* barrier, u32 parity) {
    simt::mbarrier_wait(barrier, parity);
    return true;
}
DEVICE void cp_async_cg_shared_global_16(void* to, u64 from) { simt::copy_async(to, from, 16); }
DEVICE void cp_async_mbarrier_arrive_noinc(u64* barrier) { simt::mbarrier_arrive_after(barrier); }
DEVICE void cp_async_bulk_shared_global(void* to, u64 from, u32 bytes, u64* barrier) {
    simt::copy_bulk(to, from, bytes, barrier);
}
#endif
