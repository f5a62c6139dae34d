"""Further tests of csrc/cuda: every plan of MV-Split, bytes moved, tables of shapes."""

import itertools

import pytest
import torch

import mvsplit_ops as mv
from bench.cases import CASES, Shape
from bench.common.accuracy import require_case
from bench.static import cuda_emulator
from bench.static.traffic import count
from mvsplit_ops import _cuda
from mvsplit_ops._cuda import catalogue, device, mvsplit_rmsnorm, rows
from mvsplit_ops._cuda.launch import LIMITS
from tests.op_suite import make, variant
from tests.ops.test_mvsplit_rmsnorm import merge, weighted

BY_NAME = {case.op: case for case in CASES}
PAPER = Shape(B=4, segments=(256, 64))
GPU = torch.cuda.is_available()

# Passes of a call at the paper's shape, parameters, means and partial rows included.
BUDGET = {
    "rope_qk_norm": (4.4, 6.5),
    "swiglu": (9.1, 15.1),
    "mvsplit_rmsnorm": (3.2, 5.4),
    "mvsplit_rmsnorm_with_mean": (3.2, 5.4),
    "residual_rmsnorm": (3.2, 5.4),
}
LAUNCHES = {
    "rope_qk_norm": (1, 1),
    "swiglu": (1, 1),
    "mvsplit_rmsnorm": (1, 2),
    "mvsplit_rmsnorm_with_mean": (1, 2),
    "residual_rmsnorm": (1, 2),
}


@pytest.fixture(autouse=True)
def emulated():
    """Run backend cuda in the emulator, even on a GPU machine: tests/ops runs it on the GPU."""
    with cuda_emulator.using(cuda_emulator.Emulator()) as emulator, mv.use_backend("cuda"):
        yield emulator


@pytest.mark.parametrize("op", BUDGET)
def test_moves_no_more_than_its_budget(op):
    case = BY_NAME[op]
    counted = count(case, "cuda", case.inputs(PAPER, torch.Generator().manual_seed(0)))
    for direction, budget, launches in zip(("fwd", "bwd"), BUDGET[op], LAUNCHES[op], strict=True):
        moved = counted[direction]
        passes = (moved.read + moved.written) / PAPER.pass_bytes
        assert getattr(case, direction)(PAPER) <= passes <= budget, (op, direction)
        assert moved.launches == launches


def record_launches(function):
    """Return what `function` launches: [(kernel, blocks of a cluster)]."""
    launches, emulator = [], device.installed["cpu"]
    run = emulator.launch

    def record(program, launch, args):
        launches.append((launch.kernel, launch.cluster))
        run(program, launch, args)

    emulator.launch = record
    try:
        function()
    finally:
        del emulator.launch
    return launches


# Segments, D, dtype, and the number of blocks of their clusters forward and backward.
PLANS = (
    ((20, 3), 64, torch.bfloat16, 1, 1),
    ((130, 9), 256, torch.bfloat16, 2, 2),
    ((33, 70), 512, torch.float16, 4, 4),
    ((100, 20), 1000, torch.float16, 8, 8),
    ((256, 64), 1024, torch.bfloat16, 16, 16),
    ((130, 9), 1026, torch.bfloat16, 8, 8),  # vectors of 4 bytes: plain loads instead of copies
    ((90,), 1160, torch.float32, 16, 16),
    ((180,), 2048, torch.bfloat16, 16, 16),  # 512 threads backward
)


@pytest.mark.parametrize("kind", ["plain", "weighted"])
@pytest.mark.parametrize(("segments", "D", "dtype", "fwd", "bwd"), PLANS, ids=str)
def test_every_size_of_cluster_is_as_accurate_as_eager(segments, D, dtype, fwd, bwd, kind):
    case = variant("mvsplit_rmsnorm", {"plain": merge, "weighted": weighted}[kind])
    inputs = make(case, B=2 if D < 2048 else 1, segments=segments, D=D, H=1, dtype=dtype)
    launches = record_launches(lambda: require_case(case, f"{segments} {D}", case.fused(), inputs))
    clusters = dict(kernel for kernel in launches if kernel[0] != "sum_rows")
    assert clusters == {"cluster_fwd": fwd, "cluster_bwd": bwd}


SWEEPS = (
    ((9, 40, 1), 96, torch.float32),
    ((100, 33), 256, torch.bfloat16),
    ((70, 2), 1026, torch.float16),
    ((20, 5), 2048, torch.bfloat16),
    ((130,), 8192, torch.bfloat16),
)


@pytest.mark.parametrize("kind", ["plain", "weighted"])
@pytest.mark.parametrize(("segments", "D", "dtype"), SWEEPS, ids=str)
def test_two_sweeps_are_as_accurate_as_eager(segments, D, dtype, kind):
    """On sm_80, which has no clusters, and for a segment that fits in no cluster."""
    case = variant("mvsplit_rmsnorm", {"plain": merge, "weighted": weighted}[kind])
    inputs = make(case, B=1 if D > 2048 else 2, segments=segments, D=D, H=1, dtype=dtype)
    limits = cuda_emulator.AMPERE if D < 8192 else cuda_emulator.HOPPER
    with cuda_emulator.using(cuda_emulator.Emulator(limits)):
        launches = record_launches(
            lambda: require_case(case, f"{segments} {D}", case.fused(), inputs)
        )
    sweeps = ["sweep_means", "sweep_apply", "sweep_reduce", "sweep_units", "sweep_gradients"]
    assert [kernel for kernel, _ in launches] == [*sweeps, "sum_rows"]


@pytest.mark.parametrize(
    "limits", [cuda_emulator.AMPERE, cuda_emulator.HOPPER], ids=["sm_80", "sm_90a"]
)
def test_a_carried_mean_is_the_mean_of_the_stored_y(limits):
    (x, f, alpha, beta), _, kwargs = make(variant("", merge), segments=(70, 5), D=520, H=1)
    with cuda_emulator.using(cuda_emulator.Emulator(limits)):
        y, jy = mv.mvsplit_rmsnorm_with_mean(x, f, alpha, beta, **kwargs)
        jx = mv.reference.segment_means(x, kwargs["segments"]).float()
        z, _ = mv.mvsplit_rmsnorm_with_mean(x, f, alpha, beta, jx=jx, **kwargs)
    exact = mv.reference.segment_means(y.double(), kwargs["segments"])
    assert torch.allclose(jy.double(), exact, rtol=0, atol=1e-6)
    assert (y.float() - z.float()).abs().max() <= 2**-7 * y.abs().max()


@pytest.mark.parametrize(
    "limits", [cuda_emulator.AMPERE, cuda_emulator.HOPPER], ids=["sm_80", "sm_90a"]
)
def test_an_input_mean_at_any_address(limits):
    """With jx 4 bytes into a buffer, accesses of 16 bytes would be misaligned."""
    (x, f, alpha, beta), _, kwargs = make(variant("", merge), segments=(20, 5), D=64, H=1)
    aligned = mv.reference.segment_means(x, kwargs["segments"]).float()
    offset = torch.empty(aligned.numel() + 1)[1:].view(aligned.shape).copy_(aligned)
    results = []
    for jx in (aligned, offset):
        leaves = [t.clone().requires_grad_() for t in (x, f, alpha, beta)]
        with cuda_emulator.using(cuda_emulator.Emulator(limits)):
            y, _ = mv.mvsplit_rmsnorm_with_mean(*leaves, jx=jx, **kwargs)
            y.sum().backward()
        results.append([y, *(t.grad for t in leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=2e-2, atol=2e-2)


def test_rows_of_8192_in_float32():
    case = variant("mvsplit_rmsnorm", merge)
    inputs = make(case, B=1, segments=(1, 1, 2), D=8192, H=1, dtype=torch.float32)
    launches = record_launches(lambda: require_case(case, "8192", case.fused(), inputs))
    assert launches == [("cluster_fwd", 16), ("cluster_bwd", 16), ("sum_rows", 0)]


def test_clusters_and_sweeps_compute_the_same():
    inputs = make(variant("", merge), segments=(50, 14), D=512, H=1, dtype=torch.float32)
    results = []
    for limits in (cuda_emulator.AMPERE, cuda_emulator.HOPPER):
        with cuda_emulator.using(cuda_emulator.Emulator(limits)):
            results.append(mv.mvsplit_rmsnorm(*inputs[0], **inputs[2]))
    assert torch.allclose(*results, rtol=1e-5, atol=1e-6)


def test_a_cluster_that_cannot_be_resident_is_not_launched(emulated):
    """The device is asked first: MIG slices and small GPUs do not hold 16 blocks."""
    (x, f, alpha, beta), _, kwargs = make(variant("", merge), segments=(256,), D=1024, H=1, B=1)
    launches = record_launches(lambda: mv.mvsplit_rmsnorm(x, f, alpha, beta, **kwargs))
    assert launches == [("cluster_fwd", 16)]
    emulated.holds = lambda program, launch: launch.cluster <= 8
    mvsplit_rmsnorm._choose_plan.cache_clear()
    launches = record_launches(lambda: mv.mvsplit_rmsnorm(x, f, alpha, beta, **kwargs))
    assert launches == [("cluster_fwd", 8)]


TOKENS = (1, 2, 7, 64, 77, 200, 256, 320, 512, 1024, 2048, 4096)
WIDTHS = (8, 16, 96, 512, 768, 1000, 1024, 1152, 1536, 2048, 3072, 4096, 6144, 8192)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("architecture", LIMITS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_shape_has_a_plan_that_fits(direction, architecture):
    limits = LIMITS[architecture]
    cluster_sizes = set()
    widths = range(8, 8193, 8) if architecture == "sm_90a" else WIDTHS
    for Ts, D, dtype in itertools.product(TOKENS, widths, DTYPES):
        width = 16 // dtype.itemsize
        sizes = width, dtype.itemsize, 4
        plans = mvsplit_rmsnorm.list_clusters(direction, Ts, D, sizes, limits)
        assert all(plan.blocks <= limits.cluster for plan in plans)
        for plan in plans:
            assert plan.shared <= limits.shared
            assert plan.slice % width == 0 and plan.slice * plan.blocks >= D
            assert plan.lanes * plan.items * width >= plan.slice and 32 % plan.lanes == 0
        cluster_sizes.update(plan.blocks for plan in plans[:1])
        if not plans:
            layout = rows.lay_out_rows(direction, D, 4, width)
            assert layout.lanes * layout.items * width >= D and layout.threads <= 1024
            assert layout.threads % layout.lanes == 0
            assert (
                max(layout.count_shared(D, 4, 3, False), layout.count_shared(D, 4, 1, True))
                <= limits.shared
            )
            weighted = max(layout.count_shared(D, 4, 5, False), layout.count_shared(D, 4, 4, True))
            assert weighted <= limits.shared or (D > 4096 and limits.shared < 163 << 10)
    assert cluster_sizes == ({1, 2, 4, 8, 16} & set(range(limits.cluster + 1)))


def test_segments_of_the_paper_leave_room_for_blocks_that_load_and_store():
    plan, *_ = mvsplit_rmsnorm.list_clusters("forward", 256, 1024, (8, 2, 4), cuda_emulator.HOPPER)
    assert (plan.blocks, plan.slice, plan.items) == (16, 64, 1)
    assert 3 * (plan.shared + 1024) <= cuda_emulator.HOPPER.shared_sm
    plan, *_ = mvsplit_rmsnorm.list_clusters("backward", 256, 2048, (8, 2, 4), cuda_emulator.HOPPER)
    assert plan.threads == 512 and plan.shared <= cuda_emulator.HOPPER.shared
    plan, *_ = mvsplit_rmsnorm.list_clusters("backward", 256, 1024, (8, 2, 4), cuda_emulator.HOPPER)
    assert plan.threads == 256
    assert 2 * (plan.shared + 1024) <= cuda_emulator.HOPPER.shared_sm


def test_segments_that_the_table_of_a_launch_cannot_hold():
    """The operator refuses more than 64 segments for every backend; this protects the memory."""
    x, a = torch.randn(1, 65, 8), torch.rand(8)
    options = 1e-5, False
    with pytest.raises(RuntimeError, match="at most 64, .* got 65 of 65; pass"):
        _cuda.mvsplit_rmsnorm_fwd(x, x, a, a, None, None, (1,) * 65, *options)
    assert mv.mvsplit_rmsnorm(x[:, :64], x[:, :64], a, a, segments=(1,) * 64).isfinite().all()
    with catalogue.record_launches("sm_90a"), torch.device("meta"):
        x, a = torch.empty(1, 2**31, 1), torch.empty(1)
        with pytest.raises(
            RuntimeError, match="of 2147483647 tokens in total, got 1 of 2147483648"
        ):
            _cuda.mvsplit_rmsnorm_fwd(x, x, a, a, None, None, (2**31,), *options)


def test_more_than_2_to_the_31_rows_fit_the_grid_of_a_launch():
    with catalogue.record_launches("sm_90a") as recorder, torch.device("meta"):
        x, a = torch.empty(3, 2**30, 8, dtype=torch.bfloat16), torch.empty(8)
        for segments in ((2**30,), (2**30 - 64, 64)):
            y, _, rstd, jx, jf = _cuda.mvsplit_rmsnorm_fwd(
                x, x, a, a, a, None, segments, 1e-5, True
            )
            _cuda.mvsplit_rmsnorm_bwd(x, x, x, a, a, a, rstd, jx, jf, segments)
        y, rstd = _cuda.residual_rmsnorm_fwd(x, x, a, a, 1e-5)
        _cuda.residual_rmsnorm_bwd(x, x, x, a, a, rstd)
        _cuda.swiglu_bwd(_cuda.swiglu_fwd(x, None, True), x, None, True)
        heads = x.view(3, 2**30, 1, 8)
        _, _, *rstds = _cuda.qk_norm_fwd(heads, heads, a, a, 1e-6)
        _cuda.qk_norm_bwd(heads, heads, heads, heads, *rstds, a, a)
    kernels = {launch.kernel for _, launch in recorder.launches}
    assert {"sweep_reduce", "residual_bwd", "swiglu_bwd", "heads_bwd"} <= kernels
    assert all(0 < launch.grid < 2**31 for _, launch in recorder.launches)


def test_rows_too_wide_for_shared_memory():
    x = torch.randn(1, 1, 1 << 17)
    with pytest.raises(ValueError, match="residual_rmsnorm: backend 'cuda' holds .* D = 131072 ne"):
        mv.residual_rmsnorm(x, x, torch.ones(1 << 17))


def test_the_catalogue_has_the_kernels_of_the_paper():
    launches = catalogue.list_launches("sm_90a")
    kernels = {launch.kernel for _, launch in launches}
    assert {"swiglu_fwd", "heads_bwd", "cluster_fwd", "cluster_bwd", "residual_bwd"} <= kernels
    assert all(launch.shared <= LIMITS["sm_90a"].shared for _, launch in launches)
    assert not any(launch.cluster for _, launch in catalogue.list_launches("sm_80"))
    assert len(set(catalogue.list_programs("sm_90a"))) == len(catalogue.list_programs("sm_90a"))
