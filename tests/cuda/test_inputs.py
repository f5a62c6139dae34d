"""Kernels of csrc/cuda for inputs that select other programs: long sums, tables, large gates."""

import pytest
import torch

import mvsplit_ops as mv
from bench.common.accuracy import require_accurate
from bench.static import cuda_emulator
from mvsplit_ops import _cuda, reference
from mvsplit_ops._cuda import catalogue
from tests.inputs.runs import require_all_accurate, run, run_exact_and_eager

LIMITS = {"clusters": cuda_emulator.HOPPER, "sweeps": cuda_emulator.AMPERE}


@pytest.fixture(autouse=True)
def emulated():
    with cuda_emulator.using(cuda_emulator.Emulator()) as emulator, mv.use_backend("cuda"):
        yield emulator


def list_defines(function, architecture="sm_90a"):
    """Return {kernel: the defines of its program} of the launches of a function on meta tensors."""
    with catalogue.record_launches(architecture) as recorder, torch.device("meta"):
        function()
    return {launch.kernel: program.defines for program, launch in recorder.launches}


# ---- sums ----


@pytest.mark.parametrize("plan", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_equal_tokens_in_long_segments(plan, dtype, weighted):
    """Both plans, with sums of up to 3,000 rows and of several blocks of rows."""
    g = torch.Generator().manual_seed(0)
    segments, D = (3000, 77), 8
    x, f, dy = (torch.randn(1, 1, D, generator=g).expand(1, 3077, D).to(dtype) for _ in "xfd")
    leaves = {"x": x, "f": f, "alpha": torch.full((D,), 0.2), "beta": 1 + torch.rand(D)}
    leaves |= {"weight": torch.rand(D)} if weighted else {}
    inputs = "mvsplit_rmsnorm", leaves, {"segments": segments}, [dy]
    exact, eager = run_exact_and_eager(*inputs)
    with cuda_emulator.using(cuda_emulator.Emulator(LIMITS[plan])):
        got = run(mv.mvsplit_rmsnorm, *inputs[1:])
        _, jy = mv.mvsplit_rmsnorm_with_mean(**leaves, segments=segments)
    if dtype != torch.float32 and not weighted:  # backward reads n as it was rounded
        for name in ("dx", "df", "dalpha", "dbeta"):
            del got[name], exact[name], eager[name]
    require_all_accurate(plan, got, eager, exact)
    y = got["result 0"]
    means = (reference.segment_means(t, segments) for t in (y, y.double()))
    require_accurate("jy", jy, *means)


@pytest.mark.parametrize("plan", LIMITS)
def test_a_mean_that_dominates_cancels(plan):
    """With alpha = 0 only the differences of f from a mean of 1000 reach the result."""
    f, small = 1000 + torch.randn(2, 50, 48), torch.randn(2, 50, 48)
    leaves = {"x": small, "f": f, "alpha": torch.zeros(48), "beta": torch.ones(48)}
    inputs = "mvsplit_rmsnorm", leaves, {}, [torch.randn(2, 50, 48)]
    exact, eager = run_exact_and_eager(*inputs)
    with cuda_emulator.using(cuda_emulator.Emulator(LIMITS[plan])):
        require_all_accurate(plan, run(mv.mvsplit_rmsnorm, *inputs[1:]), eager, exact)


def test_the_sums_of_a_segment_do_not_depend_on_the_batch():
    """Long segments have programs of their own, chosen by their lengths."""

    def call(B, segments, carry=False):
        x, a = torch.empty(B, sum(segments), 8, dtype=torch.bfloat16), torch.empty(8)
        return _cuda.mvsplit_rmsnorm_fwd(x, x, a, a, None, None, segments, 1e-5, carry)

    for architecture in ("sm_80", "sm_90a"):
        kernel = "sweep_means" if architecture == "sm_80" else "cluster_fwd"
        for T, long in ((256, 0), (512, 0), (513, 1), (2000, 1)):
            programs = [
                list_defines(lambda B=B, T=T: call(B, (64, T)), architecture)[kernel]
                for B in (1, 100)
            ]
            assert programs[0] == programs[1] and f"LONG={long}" in programs[0]


def test_weights_of_many_heads():
    """A thread adds the heads of its tokens: more than 32 terms are added in double."""
    q = torch.full((1, 3, 41, 16), 0.7)
    weight = 1 + torch.rand(16)
    leaves = {"q": q, "k": q[:, :, :2], "q_weight": weight, "k_weight": weight.flip(0)}
    cotangents = [torch.full_like(q, 0.3), torch.full_like(q[:, :, :2], 0.3)]
    for dtype in (torch.float32, torch.bfloat16):
        typed = {n: t.to(dtype) if t.dim() > 1 else t for n, t in leaves.items()}
        dys = [t.to(dtype) for t in cotangents]
        exact, eager = run_exact_and_eager("qk_norm", typed, {}, dys)
        require_all_accurate(str(dtype), run(mv.qk_norm, typed, {}, dys), eager, exact)

    def call(heads):
        x, rstd, w = torch.empty(1, 3, heads, 16), torch.empty(1, 3, heads), torch.empty(16)
        _cuda.qk_norm_bwd(x, x, x, x, rstd, rstd, w, w)

    for heads, long in ((32, 0), (33, 1)):
        assert f"LONG={long}" in list_defines(lambda n=heads: call(n))["heads_bwd"]


# ---- tables ----


def choose_gather(cos, sin, x):
    return list_defines(lambda: _cuda.rope_fwd(x, cos, sin, False, False))["heads_fwd"]


def test_only_tables_that_vectors_cannot_read_are_read_one_by_one():
    with torch.device("meta"):
        x = torch.empty(2, 6, 3, 32, dtype=torch.bfloat16)
        whole, wide = torch.empty(6, 16), torch.empty(6, 40)
        batch, complex_ = torch.empty(2, 6, 16), torch.empty(6, 16, dtype=torch.complex64)
        vectors = [
            (whole, whole),
            (whole.bfloat16(), whole.bfloat16()),
            (batch, batch[:1].expand(2, -1, -1)),
            (wide[:, :16], wide[:, 24:]),
        ]
        single = [
            (whole.half(), whole.half()),
            (whole.double(), whole.double()),
            (complex_.real, complex_.imag),
            (wide[:, :32:2], whole),
            (torch.empty(16, 6).mT, whole),
            (torch.empty(6, 17)[:, :16], whole),
        ]
    for tables in vectors:
        assert {"GATHER=0", "VEC=8"} <= set(choose_gather(*tables, x)), tables
    for tables in single:
        assert {"GATHER=1", "VEC=8"} <= set(choose_gather(*tables, x)), tables


def test_tables_are_read_in_place(emulated):
    """A call allocates only its result, and passes the tables themselves."""
    passed = []
    launch = emulated.launch

    def record(program, launch_, args):
        passed.extend(a.data_ptr() for a in args if isinstance(a, torch.Tensor))
        launch(program, launch_, args)

    emulated.launch = record
    angle = torch.rand(7, 8)
    table = torch.view_as_real(torch.polar(torch.ones_like(angle), angle))
    x = torch.randn(2, 5, 3, 16)
    y = mv.rope(x, table[..., 0], table[..., 1])
    assert passed == [x.data_ptr(), y.data_ptr(), table.data_ptr(), table.data_ptr() + 4]
    assert torch.allclose(y, reference.rope(x, angle.cos(), angle.sin()), atol=1e-6)


# ---- SwiGLU ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_swiglu_where_the_sigmoid_is_subnormal(dtype):
    """Gates from -88 to -86 with values so large that the product is not small."""
    gate = torch.linspace(-88, -86, 33).to(dtype)
    up, dy = (torch.full((33,), size).to(dtype) for size in (1e37, 1.0))
    for up_, dy_ in ((up, dy), (dy, up)):
        inputs = "swiglu", {"x": gate, "up": up_}, {}, [dy_]
        exact, eager = run_exact_and_eager(*inputs)
        got = run(mv.swiglu, *inputs[1:])
        assert exact["result 0"].abs().min() > 1e-37
        for name, t in got.items():
            scale = exact[name].abs()
            rounding = torch.finfo(dtype).eps * (1 if dtype != torch.float32 else 8)
            error = (t.double() - exact[name]).abs() / scale
            budget = (eager[name].double() - exact[name]).abs() / scale
            assert (error <= 2 * budget + rounding).all(), (name, error.max(), budget.max())


def test_the_packed_and_the_separate_form_launch_the_same_program():
    """Nothing is copied or concatenated, whatever the row strides are."""
    with torch.device("meta"):
        projection = torch.empty(4, 6, 256, dtype=torch.bfloat16)
    gate, up = projection[..., :64], projection[..., 128:192]

    def launches(*args):
        with catalogue.record_launches("sm_90a") as recorder, torch.device("meta"):
            y = _cuda.swiglu_fwd(*args)
            _cuda.swiglu_bwd(y, *args)
        return [(program.defines, launch.kernel) for program, launch in recorder.launches]

    packed = launches(projection[..., :128], None, True)
    assert launches(gate, up, True) == launches(projection[..., 64:192], None, False) == packed
