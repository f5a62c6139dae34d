"""The emulator of CUDA kernels: it runs them, counts their bytes and finds planted faults."""

import math

import pytest
import torch

from bench.static import cuda_emulator
from bench.static.byte_counter import ByteCounter
from mvsplit_ops._cuda.heads import rope_fwd
from mvsplit_ops._cuda.launch import Launch, Program, pack
from mvsplit_ops._cuda.swiglu import swiglu_fwd

HEADER = """
#include <common.cuh>
struct Args { global<float> in, out; i64 n; };
"""


@pytest.fixture
def run(tmp_path):
    """Run the body of a kernel on 64 threads, or as `launch` says, and return `out`."""

    def run_body(body, values=None, n=64, **launch):
        cuda_emulator._load_kernels.cache_clear()  # each toy.cu is a different kernel
        (tmp_path / "toy.cu").write_text(HEADER + "KERNEL(toy, Args, 128, 1) {" + body + "}")
        emulator = cuda_emulator.Emulator(folder=tmp_path)
        for _ in range(2):  # the threads in ascending and descending order
            out = torch.full((n,), math.nan)
            values = torch.arange(64.0) if values is None else values
            options = {"grid": 1, "block": 64, **launch}
            emulator.launch(Program("toy", ()), Launch("toy", **options), (values, out, n))
            runs.append(out)
        first, second = runs[-2:]
        assert torch.equal(first.nan_to_num(-1), second.nan_to_num(-1)), "the orders differ"
        run_body.counter = emulator.counter
        return first

    runs = []
    return run_body


COPY = "float v = load_one(args.in + tid()); store_one(args.out + tid(), v * 2);"


def test_a_kernel_runs_and_its_bytes_are_counted(run):
    assert torch.equal(run(COPY), torch.arange(64.0) * 2)
    assert run.counter == ByteCounter(256 * 2, 256 * 2, launches=2, tensors=1024)


def test_shuffles_reach_every_lane(run):
    total = run(
        "float v = sum_lanes<32>(load_one(args.in + tid())); store_one(args.out + tid(), v);"
    )
    assert total[0] == sum(range(32)) and total[63] == sum(range(32, 64))
    third = run("store_one(args.out + tid(), shuffle_from((float)tid(), 3));")
    assert third[0] == 3 and third[40] == 35


def test_a_barrier_orders_shared_memory(run):
    body = """
        float* s = (float*)dynamic_shared();
        s[tid()] = tid();
        {}
        store_one(args.out + tid(), s[63 - tid()]);
    """
    got = run(body.format("barrier_sync();"), shared=256)
    assert torch.equal(got, torch.arange(63.0, -1, -1))
    with pytest.raises(AssertionError, match="the orders differ"):
        run(body.format(""), shared=256)


def test_shared_memory_and_unwritten_outputs_are_nan(run):
    got = run(
        "if (tid() < 8) store_one(args.out + tid(), ((float*)dynamic_shared())[tid()]);", shared=64
    )
    assert got.isnan().all()


CLUSTER = """
    float* s = (float*)dynamic_shared();
    if (tid() == 0) s[0] = 10 + ctaid();
    {before}
    u32 peer = cluster_ctarank() ^ 1;
    float v = mov_f32(ld_shared_cluster_b32(mapa_shared_cluster(s, peer)));
    {after}
    if (tid() < 32) store_one(args.out + ctaid() * 32 + tid(), v);
"""
SYNC = "barrier_cluster_arrive_release(); barrier_cluster_wait_acquire();"


def test_blocks_of_a_cluster_read_each_other(run):
    got = run(CLUSTER.format(before=SYNC, after=SYNC), grid=2, cluster=2, shared=16)
    assert set(got[:32].tolist()) == {11} and set(got[32:].tolist()) == {10}


def test_reading_the_memory_of_a_block_that_has_exited_is_a_fault(run):
    with pytest.raises(cuda_emulator.Fault, match="the block of rank . has exited"):
        run(CLUSTER.format(before="", after=""), grid=2, cluster=2, shared=16)


BULK = """
    u64* barrier = (u64*)dynamic_shared();
    float* s = (float*)(dynamic_shared() + 16);
    if (tid() == 0) { mbarrier_init(barrier, 1); fence_mbarrier_init(); }
    barrier_sync();
    if (tid() == 0) {
        mbarrier_arrive_expect_tx(barrier, BYTES);
        cp_async_bulk_shared_global(s, args.in.address + FROM, 256, barrier);
    }
    WAIT
    store_one(args.out + tid(), s[tid()]);
"""
WAIT = "while (!mbarrier_try_wait_parity(barrier, 0)) {}"


def bulk(wait=WAIT, size="256", start="0"):
    return BULK.replace("WAIT", wait).replace("BYTES", size).replace("FROM", start)


def test_a_bulk_copy_finishes_only_at_its_barrier(run):
    assert torch.equal(run(bulk(), shared=272), torch.arange(64.0))
    assert run(bulk("barrier_sync();"), shared=272).isnan().all()


FAULTS = {
    "a read after a tensor": (
        COPY.replace("args.in + tid()", "args.in + tid() + 1"),
        {},
        "block 0, thread 63: ld.global.nc.b32 of 4 bytes at offset 256 of tensor 0, which has 256",
    ),
    "a read before a tensor": ("load_one(args.in + -1);", {}, "at offset -4 of tensor 0"),
    "a write after a tensor": (
        "store_one(args.out + args.n, 1.f);",
        {},
        "st.global.b32 of 4 bytes",
    ),
    "an address outside all tensors": (
        "load_one(global<float>{64});",
        {},
        "at an address outside all tensors",
    ),
    "an unaligned vector": ("load<4>(args.in + 1);", {}, "at an unaligned address"),
    "a barrier that one thread misses": (
        "if (tid() != 40) barrier_sync();",
        {},
        "barrier.sync: block 0, thread 0 waits, block 0, thread 40 has returned",
    ),
    "a shuffle that one lane misses": (
        "if (tid() % 32 < 31) shuffle_xor(1.f, 1); else barrier_sync();",
        {},
        "shfl.sync: block 0, thread 0 waits, block 0, thread 31 waits at barrier.sync",
    ),
    "a cluster's barrier that a block misses": (
        f"if (ctaid() == 1) {{ {SYNC} }}",
        {"grid": 2, "cluster": 2},
        "barrier.cluster: block 1, thread 0 waits, block 0, thread 0 has returned",
    ),
    "shared memory too small": (
        "dynamic_shared()[260] = 1;",
        {"shared": 256},
        "4 bytes after its end",
    ),
    "a tensor written and read through .nc": (
        "store_one(args.in + tid(), load_one(args.in + tid()));",
        {},
        "tensor 0 is written and read through .nc in one launch",
    ),
    "a barrier that expects too many bytes": (
        bulk(size="512"),
        {"shared": 272},
        "mbarrier.try_wait: block 0, thread 0 waits forever",
    ),
    "an unaligned bulk copy": (bulk(start="4"), {"shared": 272}, "not 16-byte aligned"),
    "a bulk copy outside shared memory": (bulk(), {"shared": 256}, "outside the shared memory"),
    "an mbarrier without init": (
        "mbarrier_arrive_expect_tx((u64*)dynamic_shared(), 0);",
        {"shared": 16},
        "used before mbarrier.init",
    ),
    "a read after another block's shared memory": (
        "ld_shared_cluster_b32(mapa_shared_cluster(dynamic_shared() + 64, 0));",
        {"shared": 64},
        "outside the shared memory of the cluster",
    ),
    "a rank outside the cluster": (
        "mapa_shared_cluster(dynamic_shared(), 2);",
        {"grid": 2, "cluster": 2},
        "mapa: rank 2 in a cluster of 2",
    ),
    "more threads than the kernel takes": ("", {"block": 256}, "takes at most 128 threads"),
    "more shared memory than a block has": ("", {"shared": 1 << 20}, "exceeds Limits"),
    "an incomplete cluster": ("", {"grid": 3, "cluster": 2}, "3 blocks are not whole clusters"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_raises_an_error_that_names_it(run, name):
    body, launch, message = FAULTS[name]
    with pytest.raises(cuda_emulator.Fault) as fault:
        run(body, **launch)
    assert message in str(fault.value) and "toy.cu, toy" in str(fault.value)


def test_arguments_of_another_size_than_the_struct_are_a_fault(run, tmp_path):
    run(COPY)
    emulator = cuda_emulator.Emulator(folder=tmp_path)
    with pytest.raises(cuda_emulator.Fault, match="Args has 24 bytes, the launcher packed 16"):
        emulator.launch(Program("toy", ()), Launch("toy", 1, 64), (torch.ones(4), torch.ones(4)))


def test_a_compile_error_shows_the_command_and_the_line(run):
    with pytest.raises(cuda_emulator.Fault, match=r"g\+\+ [\s\S]*nonsense"):
        run("nonsense;")


def test_kernels_read_strided_tensors():
    memory = torch.randn(5, 96, dtype=torch.bfloat16)
    with cuda_emulator.using(cuda_emulator.Emulator()) as emulator:
        rows = memory[:, :48]
        expected = swiglu_fwd(rows.contiguous(), None, True)
        assert torch.equal(swiglu_fwd(rows, None, True), expected)
        assert emulator.counter.launches == 2
        q, cos = torch.randn(2, 3, 4, 32)[:, :, ::2], torch.rand(3, 32)[:, ::2]
        expected = rope_fwd(q.contiguous(), cos.contiguous(), cos.contiguous(), False, False)
        assert torch.equal(rope_fwd(q, cos, cos, False, False), expected)


def test_approximations_flush_subnormal_numbers_as_the_ptx_isa_says(run):
    """.ftz flushes inputs and results, and rsqrt.approx without it neither."""
    tiny, inf = 2.0**-130, math.inf
    values = torch.tensor([0.0, tiny, -tiny, 1.0, 4.0, inf, -inf, math.nan] * 8)
    nan = math.nan

    def apply(function):
        got = run(f"store_one(args.out + tid(), {function}(load_one(args.in + tid())));", values)
        return [repr(v) for v in got[:8].tolist()]  # repr tells -0.0 from 0.0

    def listed(*expected):
        return [repr(float(v)) for v in expected]

    assert apply("ex2_approx_ftz_f32") == listed(1, 1, 1, 2, 16, inf, 0, nan)
    assert apply("rcp_approx_ftz_f32") == listed(inf, inf, -inf, 1, 0.25, 0, -0.0, nan)
    roots = [v.removeprefix("-") for v in apply("rsqrt_approx_f32")]  # the sign of NaN
    assert roots == listed(inf, 2.0**65, nan, 1, 0.5, 0, nan, nan)
    values = torch.tensor([-127.0, -126.0, 2.0**127, -(2.0**127)] * 16)
    assert apply("ex2_approx_ftz_f32")[:3] == listed(0, 2.0**-126, inf)
    assert apply("rcp_approx_ftz_f32")[2:4] == listed(0, -0.0)


def test_arguments_are_packed_in_eight_bytes_each():
    t = torch.ones(3)
    packed = pack((t, None, 3, True, 0.5, b"1234"))
    fields = torch.frombuffer(bytearray(packed[:40]), dtype=torch.int64)
    assert fields[:4].tolist() == [t.data_ptr(), 0, 3, 1] and len(packed) == 44
    assert torch.frombuffer(bytearray(packed[32:40]), dtype=torch.float64).item() == 0.5


def test_conversions_round_as_on_a_gpu():
    """bfloat16 and float16 conversions agree with PyTorch's, in a rotation by an angle of 0."""
    special = [0.0, -0.0, 1.0, 65504.0, 65519.0, 1e-8, 6e-8, 5.97e-8, 3e-5, 6.1e-5, 2e-5, -6e4]
    values = torch.cat((torch.tensor(special), torch.randn(4084) * torch.randn(4084).exp()))
    wide, one, zero = values.view(1, 1, -1, 2), torch.ones(1, 1), torch.zeros(1, 1)
    for dtype in (torch.bfloat16, torch.float16):
        x, third = wide.to(dtype), torch.tensor(0.3)
        with cuda_emulator.using(cuda_emulator.Emulator()):
            assert torch.equal(rope_fwd(x, one, zero, False, False), x)
            scaled = rope_fwd(x, one * third, zero, False, False)
        assert torch.equal(scaled, (x.float() * third).to(dtype))
