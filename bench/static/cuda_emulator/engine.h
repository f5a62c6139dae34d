// Interface of the engine (engine.cpp) that ptx.cuh calls: one GPU thread is one fiber.
#pragma once

namespace simt {

using u32 = unsigned int;
using u64 = unsigned long long;

struct Place {
    u32 thread, block, blocks;  // index in the block, of the block; blocks of the grid
    u32 rank, ranks;            // index of the block in its cluster; blocks of the cluster
};
const Place& here();

// Global memory: checks bounds against the tensors of the launch, and counts the bytes.
const void* reads(u64 at, u32 bytes, const char* instruction);
void* writes(u64 at, u32 bytes, const char* instruction);

char* shared();                              // of this block
char* shared_of(const void* own, u32 rank);  // the same place in another block
const void* remote(const char* at, u32 bytes, const char* instruction);

void block_barrier();
void cluster_arrive();
void cluster_wait();
u32 exchange(u32 value, u32 lane);  // the value that `lane` of this warp passed

void mbarrier_init(u64* barrier, u32 arrivals);
void mbarrier_arrive(u64* barrier, u32 bytes);
void mbarrier_wait(u64* barrier, u32 parity);
void copy_bulk(void* to, u64 from, u32 bytes, u64* barrier);
void copy_async(void* to, u64 from, u32 bytes);
void mbarrier_arrive_after(u64* barrier);  // after the copy_async calls of this thread so far

[[noreturn]] void fail(const char* format, ...);

}  // namespace simt
