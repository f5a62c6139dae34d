// PTX instructions and CUDA built-ins used by the kernels, each wrapped once under its PTX name.
//
// No other file contains asm or a CUDA built-in, and no toolkit header is included. A second file
// of this name therefore runs the same kernels elsewhere: bench/static/cuda_emulator/ptx.cuh does
// so on a CPU.
#pragma once

#define DEVICE __device__ __forceinline__
// A kernel with at most `threads` threads per block; registers must allow `resident` blocks per SM.
#define KERNEL(name, Args, threads, resident)                       \
    extern "C" __global__ void __launch_bounds__(threads, resident) \
        name(const __grid_constant__ Args args)

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct b128 {
    u32 x, y, z, w;
};

// ---- Thread and block indices ----
DEVICE u32 tid() { return threadIdx.x; }
DEVICE u32 ctaid() { return blockIdx.x; }
DEVICE u32 nctaid() { return gridDim.x; }

// ---- Global memory. A .nc load requires that the launch does not write what it reads. ----
DEVICE u16 ld_global_nc_b16(u64 address) {
    u16 v;
    asm("ld.global.nc.b16 %0, [%1];" : "=h"(v) : "l"(address));
    return v;
}
DEVICE u32 ld_global_nc_b32(u64 address) {
    u32 v;
    asm("ld.global.nc.b32 %0, [%1];" : "=r"(v) : "l"(address));
    return v;
}
DEVICE u64 ld_global_nc_b64(u64 address) {
    u64 v;
    asm("ld.global.nc.b64 %0, [%1];" : "=l"(v) : "l"(address));
    return v;
}
DEVICE b128 ld_global_nc_v4_b32(u64 address) {
    b128 v;
    asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(address));
    return v;
}
DEVICE void st_global_b16(u64 address, u16 v) {
    asm volatile("st.global.b16 [%0], %1;" ::"l"(address), "h"(v) : "memory");
}
DEVICE void st_global_b32(u64 address, u32 v) {
    asm volatile("st.global.b32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}
DEVICE void st_global_b64(u64 address, u64 v) {
    asm volatile("st.global.b64 [%0], %1;" ::"l"(address), "l"(v) : "memory");
}
DEVICE void st_global_v4_b32(u64 address, b128 v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}

// ---- Conversions and math ----
DEVICE u32 cvt_rn_bf16x2_f32(float high, float low) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
DEVICE u32 cvt_rn_f16x2_f32(float high, float low) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
DEVICE float cvt_f32_f16(u16 bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
}
DEVICE float mov_f32(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 mov_b32(float v) { return __float_as_uint(v); }
DEVICE double mov_f64(u64 bits) { return __longlong_as_double(bits); }
DEVICE u64 mov_b64(double v) { return __double_as_longlong(v); }
// .ftz: subnormal inputs count as zero, and subnormal results become zero.
DEVICE float ex2_approx_ftz_f32(float v) {  // 2 ulp
    float p;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(v));
    return p;
}
DEVICE float rcp_approx_ftz_f32(float v) {  // 1 ulp
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
DEVICE float exp_f32(float v) { return expf(v); }
DEVICE double exp_f64(double v) { return exp(v); }
DEVICE float rsqrt_approx_f32(float v) {  // 2 ulp
    float r;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
DEVICE float rsqrt_rn_f32(float v) { return __frsqrt_rn(v); }
DEVICE double rsqrt_f64(double v) { return rsqrt(v); }

// ---- Warp; all 32 lanes must take part ----
DEVICE u32 shfl_sync_bfly_b32(u32 v, u32 lanes) {
    u32 other;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=r"(other) : "r"(v), "r"(lanes));
    return other;
}
DEVICE u32 shfl_sync_idx_b32(u32 v, u32 lane) {
    u32 other;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, -1;" : "=r"(other) : "r"(v), "r"(lane));
    return other;
}

// ---- Block ----
DEVICE void barrier_sync() { __syncthreads(); }
DEVICE char* dynamic_shared() {
    extern __shared__ __align__(128) char shared[];
    return shared;
}

#if __CUDA_ARCH__ >= 900
// ---- Cluster: its blocks run concurrently and access each other's shared memory ----
DEVICE u32 cluster_ctarank() {
    u32 v;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
    return v;
}
DEVICE u32 cluster_nctarank() {
    u32 v;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(v));
    return v;
}
DEVICE void barrier_cluster_arrive_release() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
DEVICE void barrier_cluster_wait_acquire() {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
DEVICE u32 cvta_to_shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// Address in the shared memory of block `rank` that corresponds to `p` in that of this block.
DEVICE u32 mapa_shared_cluster(const void* p, u32 rank) {
    u32 address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"(cvta_to_shared(p)), "r"(rank));
    return address;
}
DEVICE u32 ld_shared_cluster_b32(u32 address) {
    u32 v;
    asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}
DEVICE u64 ld_shared_cluster_b64(u32 address) {
    u64 v;
    asm volatile("ld.shared::cluster.b64 %0, [%1];" : "=l"(v) : "r"(address) : "memory");
    return v;
}
DEVICE void st_shared_cluster_b32(u32 address, u32 v) {
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
DEVICE void st_shared_cluster_b64(u32 address, u64 v) {
    asm volatile("st.shared::cluster.b64 [%0], %1;" ::"r"(address), "l"(v) : "memory");
}

// ---- Asynchronous copies and the mbarriers that signal their completion ----
DEVICE void mbarrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(cvta_to_shared(barrier)),
                 "r"(arrivals)
                 : "memory");
}
// Make initialised mbarriers visible to the copy engine.
DEVICE void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Order this thread's writes to shared memory before accesses of the copy engine.
DEVICE void fence_proxy_async_shared_cta() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void mbarrier_arrive_expect_tx(u64* barrier, u32 bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(cvta_to_shared(barrier)),
        "r"(bytes)
        : "memory");
}
DEVICE bool mbarrier_try_wait_parity(u64* barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(cvta_to_shared(barrier)), "r"(parity)
        : "memory");
    return done;
}
// Copy 16 bytes, 16-byte aligned, bypassing L1.
DEVICE void cp_async_cg_shared_global_16(void* to, u64 from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(cvta_to_shared(to)), "l"(from)
                 : "memory");
}
// Arrive for this thread when all of its preceding cp.async copies have completed.
DEVICE void cp_async_mbarrier_arrive_noinc(u64* barrier) {
    asm volatile(
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(cvta_to_shared(barrier))
        : "memory");
}
// Addresses are 16-byte aligned, the size is a multiple of 16 bytes.
DEVICE void cp_async_bulk_shared_global(void* to, u64 from, u32 bytes, u64* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(cvta_to_shared(to)),
        "l"(from), "r"(bytes), "r"(cvta_to_shared(barrier))
        : "memory");
}
#endif
