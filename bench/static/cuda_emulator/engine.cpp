// Runs a kernel on CPU memory: the blocks of a cluster concurrently, one cluster after the other.
//
// A fiber runs until it must wait; then the next one runs. Threads synchronize only at barriers, so
// a thread that reads before another was forced to write finds poison. Launches run their fibers in
// ascending and descending order in turn, which exposes a missing barrier in both directions.
#include "engine.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace simt {
namespace {

constexpr u64 SLOT = 16ull << 30;  // addresses reserved per tensor, so that no other is near
constexpr u32 SLOTS = 64;
constexpr u32 RANKS = 16;
constexpr u32 BLOCK_SHARED = 512 << 10;
constexpr u32 CANARY = 4096;  // bytes checked after the shared memory of a launch
constexpr size_t STACK = 64 << 10;
constexpr int POISON = 0xff;  // NaN in every type
constexpr int INTACT = 0xcd;

struct Tensor {
    u64 begin, end;
    bool read, written;
};
// A barrier for the threads of a block or of a cluster, or the lanes of a warp.
struct Barrier {
    const char* name;
    u32 expected, arrived;
    u64 round;
};
struct Warp {
    Barrier shuffle;
    u32 values[2][32];
};
struct Copy {
    void* to;
    u64 from;
    u32 bytes;
    bool counted;  // subtracted from the bytes that its barrier expects
};
struct MBarrier {
    u32 arrivals, pending, after_copies;  // after_copies: arrivals once the copies complete
    long long bytes;
    u64 phase;
    std::vector<Copy> copies;
};
struct Block {
    Barrier barrier;
    std::vector<Warp> warps;
    std::map<u64*, MBarrier> mbarriers;
    u32 running;
};
struct Fiber {
    jmp_buf context;
    ucontext_t start;
    bool started, done;
    Place place;
    Block* block;
    const u64* counter;  // the fiber waits while *counter == value
    u64 value, cluster_round;
    const char* waits_for;
    std::vector<Copy> copies;  // started, without a barrier yet
};

char *tensor_memory, *shared_memory, *stacks;
std::vector<Tensor> tensors;
std::vector<Fiber> fibers;
std::vector<Block> blocks;
Barrier cluster;
Fiber* self;
u32 shared_bytes, threads;
u64 bytes_read, bytes_written;
jmp_buf scheduler, abandoned;
std::string message;
void (*kernel)(const void*);
const void* arguments;

char* reserve(u64 bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    return p == MAP_FAILED ? nullptr : (char*)p;
}

char* shared_of_rank(u32 rank) { return shared_memory + (u64)rank * BLOCK_SHARED; }

std::string name(const Fiber& f) {
    return "block " + std::to_string(f.place.block) + ", thread " + std::to_string(f.place.thread);
}

void wait(const u64* counter, u64 value, const char* barrier) {
    while (*counter == value) {
        self->counter = counter, self->value = value, self->waits_for = barrier;
        if (!_setjmp(self->context)) _longjmp(scheduler, 1);
    }
    self->counter = nullptr;
}

u64 arrive(Barrier& b) {
    u64 round = b.round;
    if (++b.arrived == b.expected) b.arrived = 0, ++b.round;
    return round;
}

void body() {
    kernel(arguments);
    self->done = true;
    --self->block->running;
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) void resume(Fiber* f) {
    self = f;
    if (_setjmp(scheduler)) return;
    if (f->started) _longjmp(f->context, 1);
    f->started = true;
    setcontext(&f->start);
}

// Reports a deadlock: a waiting thread, and one that does not reach its barrier.
[[noreturn]] void report_deadlock() {
    const Fiber* waiting = nullptr;
    for (const Fiber& f : fibers)
        if (!f.done) {
            waiting = &f;
            break;
        }
    for (const Fiber& f : fibers) {
        bool same_barrier = f.block == waiting->block || waiting->counter == &cluster.round;
        if (!same_barrier || (!f.done && f.counter == waiting->counter)) continue;
        std::string state = f.done ? "has returned" : std::string("waits at ") + f.waits_for;
        self = nullptr;
        fail("%s: %s waits, %s %s", waiting->waits_for, name(*waiting).c_str(), name(f).c_str(),
             state.c_str());
    }
    self = nullptr;
    fail("%s: %s waits forever", waiting->waits_for, name(*waiting).c_str());
}

MBarrier& mbarrier_of(u64* barrier) {
    auto entry = self->block->mbarriers.find(barrier);
    if (entry == self->block->mbarriers.end()) fail("mbarrier: used before mbarrier.init");
    return entry->second;
}

void complete_phase(MBarrier& m) {
    if (m.pending || m.bytes) return;
    m.pending = m.arrivals;
    ++m.phase;
}

bool finish_copies(MBarrier& m) {
    if (m.copies.empty() && !m.after_copies) return false;
    for (const Copy& copy : m.copies) {
        memcpy(copy.to, (const void*)copy.from, copy.bytes);
        if (copy.counted) m.bytes -= copy.bytes;
    }
    m.copies.clear();
    if (m.after_copies > m.pending) fail("mbarrier: more arrivals than mbarrier.init expects");
    m.pending -= m.after_copies;
    m.after_copies = 0;
    complete_phase(m);
    return true;
}

// Finishes the copies that started after their waiters arrived; called when no fiber can run.
bool finish_all_copies() {
    bool any = false;
    for (Block& block : blocks)
        for (auto& entry : block.mbarriers) any |= finish_copies(entry.second);
    return any;
}

void set_up(u32 first_block, u32 grid, u32 ranks) {
    cluster = {"barrier.cluster", ranks * threads, 0, 0};
    for (u32 rank = 0; rank < ranks; ++rank) {
        Block& block = blocks[rank];
        block.barrier = {"barrier.sync", threads, 0, 0};
        block.mbarriers.clear();
        block.running = threads;
        for (Warp& warp : block.warps) warp.shuffle = {"shfl.sync", 32, 0, 0};
        memset(shared_of_rank(rank), POISON, shared_bytes);
        memset(shared_of_rank(rank) + shared_bytes, INTACT, CANARY);
        for (u32 t = 0; t < threads; ++t) {
            u32 i = rank * threads + t;
            Fiber& f = fibers[i];
            f.started = f.done = false;
            f.place = {t, first_block + rank, grid, rank, ranks};
            f.block = &block;
            f.counter = nullptr;
            f.waits_for = "";
            f.copies.clear();
            getcontext(&f.start);
            f.start.uc_stack.ss_sp = stacks + i * STACK;
            f.start.uc_stack.ss_size = STACK;
            f.start.uc_link = nullptr;
            makecontext(&f.start, body, 0);
        }
    }
}

void run_cluster(bool descending) {
    u32 count = fibers.size(), left = count;
    while (left) {
        bool moved = false;
        for (u32 i = 0; i < count; ++i) {
            Fiber& f = fibers[descending ? count - 1 - i : i];
            if (f.done || (f.counter && *f.counter == f.value)) continue;
            resume(&f);
            moved = true;
            left -= f.done;
        }
        if (!moved && !finish_all_copies()) report_deadlock();
    }
}

void check_after(u32 ranks) {
    self = nullptr;
    for (u32 rank = 0; rank < ranks; ++rank)
        for (u32 i = 0; i < CANARY; ++i)
            if (shared_of_rank(rank)[shared_bytes + i] != (char)INTACT)
                fail("shared memory written %u bytes after its end", i);
    for (size_t i = 0; i < tensors.size(); ++i)
        if (tensors[i].read && tensors[i].written)
            fail("tensor %zu is written and read through .nc in one launch", i);
}

Tensor& tensor_at(u64 at, u32 bytes, const char* instruction) {
    u64 slot = (at - (u64)tensor_memory) / SLOT;
    if (at < (u64)tensor_memory || slot >= tensors.size())
        fail("%s at an address outside all tensors", instruction);
    Tensor& t = tensors[slot];
    if (at < t.begin || at + bytes > t.end)
        fail("%s of %u bytes at offset %lld of tensor %llu, which has %llu bytes", instruction,
             bytes, (long long)(at - t.begin), slot, t.end - t.begin);
    if (at % (bytes < 16 ? bytes : 16)) fail("%s at an unaligned address", instruction);
    return t;
}

}  // namespace

void fail(const char* format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    message = (self ? name(*self) + ": " : "") + text;
    _longjmp(abandoned, 1);
}

const Place& here() { return self->place; }

const void* reads(u64 at, u32 bytes, const char* instruction) {
    tensor_at(at, bytes, instruction).read = true;
    bytes_read += bytes;
    return (const void*)at;
}

void* writes(u64 at, u32 bytes, const char* instruction) {
    tensor_at(at, bytes, instruction).written = true;
    bytes_written += bytes;
    return (void*)at;
}

char* shared() { return shared_of_rank(self->place.rank); }

char* shared_of(const void* own, u32 rank) {
    if (rank >= self->place.ranks)
        fail("mapa: rank %u in a cluster of %u", rank, self->place.ranks);
    return shared_of_rank(rank) + ((const char*)own - shared());
}

const void* remote(const char* at, u32 bytes, const char* instruction) {
    u64 rank = (at - shared_memory) / BLOCK_SHARED;
    u64 offset = (at - shared_memory) % BLOCK_SHARED;
    if (at < shared_memory || rank >= self->place.ranks || offset + bytes > shared_bytes)
        fail("%s outside the shared memory of the cluster", instruction);
    if (offset % bytes) fail("%s at an unaligned address", instruction);
    if (!blocks[rank].running) fail("%s: the block of rank %llu has exited", instruction, rank);
    return at;
}

void block_barrier() {
    Barrier& b = self->block->barrier;
    wait(&b.round, arrive(b), b.name);
}

void cluster_arrive() { self->cluster_round = arrive(cluster); }
void cluster_wait() { wait(&cluster.round, self->cluster_round, cluster.name); }

u32 exchange(u32 value, u32 lane) {
    Warp& warp = self->block->warps[self->place.thread / 32];
    u32* values = warp.values[warp.shuffle.round & 1];
    values[self->place.thread % 32] = value;
    wait(&warp.shuffle.round, arrive(warp.shuffle), warp.shuffle.name);
    return values[lane];
}

void mbarrier_init(u64* barrier, u32 arrivals) {
    self->block->mbarriers[barrier] = {arrivals, arrivals, 0, 0, 0, {}};
}

void mbarrier_arrive(u64* barrier, u32 bytes) {
    MBarrier& m = mbarrier_of(barrier);
    if (!m.pending) fail("mbarrier: more arrivals than mbarrier.init expects");
    m.bytes += bytes;
    --m.pending;
    complete_phase(m);
}

// A copy finishes as late as it may: when a thread waits for it.
void mbarrier_wait(u64* barrier, u32 parity) {
    MBarrier& m = mbarrier_of(barrier);
    finish_copies(m);
    if ((m.phase & 1) == parity) wait(&m.phase, m.phase, "mbarrier.try_wait");
}

static Copy start_copy(void* to, u64 from, u32 bytes, bool counted, const char* instruction) {
    if (bytes % 16 || from % 16 || (u64)to % 16) fail("%s: not 16-byte aligned", instruction);
    remote((char*)to, 16, instruction);
    remote((char*)to + bytes - 16, 16, instruction);
    reads(from, bytes, instruction);
    return {to, from, bytes, counted};
}

void copy_bulk(void* to, u64 from, u32 bytes, u64* barrier) {
    mbarrier_of(barrier).copies.push_back(start_copy(to, from, bytes, true, "cp.async.bulk"));
}

void copy_async(void* to, u64 from, u32 bytes) {
    self->copies.push_back(start_copy(to, from, bytes, false, "cp.async"));
}

void mbarrier_arrive_after(u64* barrier) {
    MBarrier& m = mbarrier_of(barrier);
    m.copies.insert(m.copies.end(), self->copies.begin(), self->copies.end());
    self->copies.clear();
    ++m.after_copies;
}

}  // namespace simt

using namespace simt;

extern "C" {

// Returns 0 if the addresses, few of which are ever touched, cannot be reserved.
int simt_begin() {
    if (!stacks) {
        tensor_memory = reserve(SLOT * SLOTS);
        shared_memory = reserve((u64)BLOCK_SHARED * RANKS);
        stacks = reserve(RANKS * 1024 * STACK);
    }
    tensors.clear();
    return tensor_memory && shared_memory && stacks;
}

// Returns a place for `bytes` with the same offset from a 256-byte boundary as `from`, or 0.
u64 simt_place(u64 from, u64 bytes) {
    if (tensors.size() == SLOTS || bytes > SLOT - 4096) return 0;
    u64 begin = (u64)tensor_memory + tensors.size() * SLOT + 1024 + from % 256;
    tensors.push_back({begin, begin + bytes, false, false});
    return begin;
}

int simt_written(u32 slot) { return tensors[slot].written; }

// Returns null, or the fault. counted receives the bytes read and written.
const char* simt_run(void (*entry)(const void*), const void* args, u32 grid, u32 block, u32 ranks,
                     u32 shared, int descending, u64* counted) {
    kernel = entry, arguments = args, threads = block, shared_bytes = shared;
    bytes_read = bytes_written = 0;
    fibers.resize(ranks * block);
    blocks.resize(ranks);
    for (Block& b : blocks) b.warps.resize((block + 31) / 32);
    self = nullptr;
    if (_setjmp(abandoned)) return message.c_str();
    if (ranks > RANKS || block > 1024 || shared + CANARY > BLOCK_SHARED || block % 32)
        fail("cannot launch %u threads, %u blocks per cluster, %u bytes", block, ranks, shared);
    for (u32 i = 0; i < grid / ranks; ++i) {
        u32 unit = descending ? grid / ranks - 1 - i : i;
        set_up(unit * ranks, grid, ranks);
        run_cluster(descending);
        check_after(ranks);
    }
    counted[0] = bytes_read, counted[1] = bytes_written;
    return nullptr;
}
}
