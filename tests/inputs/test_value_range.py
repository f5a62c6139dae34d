"""Values over the whole range of each dtype, results and gradients, compared with eager code.

Where eager code is finite, a kernel is finite and obeys the accuracy rule in every row; where the
exact result is NaN or infinite, so is the kernel's. Where eager code overflows although the exact
result is finite, there is no rule.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import mvsplit_ops as mv
from bench.common.accuracy import require_accurate
from tests.inputs.runs import each_instruction_set, run, run_exact_and_eager

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (1e-4, 1e-2, 1.0, 300.0, 6e4)
WIDTH = 40  # whole vectors of every instruction set, and a rest
T = 2


def rows(g, *shape):
    """Return numbers from 1 to 2, the first token's positive, the second's negative, and so on."""
    signs = 1 - 2.0 * (torch.arange(shape[1]) % 2)
    return (1 + torch.rand(shape, generator=g)) * signs.view(-1, *[1] * (len(shape) - 2))


def mixed_rows(g, *shape):
    """Return numbers from 1 to 2 with random signs."""
    return rows(g, *shape) * (1 - 2.0 * torch.randint(2, shape, generator=g))


def gains(g, mean):
    return mean + 0.1 * torch.randn(WIDTH, generator=g)


def swiglu(g, B):
    """A gate of one sign in each row, and values next to it."""
    gate, up = rows(g, B, T, WIDTH), mixed_rows(g, B, T, WIDTH)
    return "swiglu", {"x": gate, "up": up}, {}


def rope(g, B):
    angle = 6.3 * torch.rand(T, WIDTH // 2, generator=g)
    tables = {"cos": angle.cos(), "sin": angle.sin()}
    return "rope", {"x": mixed_rows(g, B, T, 1, WIDTH)}, tables


def qk_norm(g, B):
    q, k = (mixed_rows(g, B, T, 1, WIDTH) for _ in "qk")
    return "qk_norm", {"q": q, "k": k, "q_weight": gains(g, 1.0)}, {}


def rope_qk_norm(g, B):
    _, leaves, _ = qk_norm(g, B)
    _, _, tables = rope(g, B)
    return "rope_qk_norm", leaves, tables


def residual(g, B):
    x, f = (mixed_rows(g, B, T, WIDTH) for _ in "xf")
    return "residual_rmsnorm", {"x": x, "f": f, "scale": gains(g, 0.2)}, {}


def weighted_residual(g, B):
    op, leaves, constants = residual(g, B)
    return op, {**leaves, "weight": gains(g, 1.0)}, constants


def mvsplit(g, B):
    x, f = (mixed_rows(g, B, T, WIDTH) for _ in "xf")
    return "mvsplit_rmsnorm", {"x": x, "f": f, "alpha": gains(g, 0.2), "beta": gains(g, 1.0)}, {}


def weighted_mvsplit(g, B):
    op, leaves, constants = mvsplit(g, B)
    return op, {**leaves, "weight": gains(g, 1.0)}, constants


OPERATORS = (
    *(swiglu, rope, qk_norm, rope_qk_norm),
    *(residual, weighted_residual, mvsplit, weighted_mvsplit),
)


def is_activation(t):
    return t.dim() > 2


def make(operator, dtype, magnitudes, cotangent_magnitudes):
    """Return (op, leaves, constants, cotangents); a sample has each pair of magnitudes.

    magnitudes  of activations, (B,) float64, infinity and NaN included: these replace one element
    """
    g, device = torch.Generator("cpu").manual_seed(0), torch.get_default_device()
    largest = torch.finfo(dtype).max
    with torch.device("cpu"):
        op, leaves, constants = operator(g, len(magnitudes))
        results = [t for name, t in leaves.items() if name in ("x", "q", "k")]
        count = 1 if op == "swiglu" else len(results)
        cotangents = [torch.randn(t.shape, generator=g).sign() * t for t in results[:count]]

    def scale(t, by):
        by = by.view(-1, *[1] * (t.dim() - 1))
        scaled = (t.double() * by.where(by.isfinite(), 1)).clamp(-largest, largest)
        scaled[..., 3] = torch.where(by[..., 0].isfinite(), scaled[..., 3], by[..., 0])
        return scaled.to(device, dtype)

    leaves = {
        name: scale(t, magnitudes) if is_activation(t) else t.to(device)
        for name, t in leaves.items()
    }
    constants = {name: t.to(device) for name, t in constants.items()}
    return op, leaves, constants, [scale(t, cotangent_magnitudes) for t in cotangents]


def magnitudes_of(dtype):
    """Return powers of two from the smallest subnormal to the largest, and special values."""
    info = torch.finfo(dtype)
    smallest, largest = (round(math.log2(n)) for n in (info.smallest_normal * info.eps, info.max))
    special = [0.0, math.inf, -math.inf, math.nan]
    if dtype == torch.float64:  # nothing is more exact, and the cube of 1/rms must not underflow
        return [*special, *(2.0**n for n in range(smallest + 128, largest // 3, 30))]
    step = 1 if dtype == torch.float16 else 6
    return [*special, info.max, *(2.0**n for n in range(smallest, largest, step))]


def sweep(dtype):
    """Return the magnitudes of activations and of cotangents: one varies while the other is 1."""
    varied = torch.tensor(magnitudes_of(dtype), dtype=torch.float64, device="cpu")
    return torch.cat((varied, torch.ones_like(varied))), torch.cat(
        (torch.ones_like(varied), varied)
    )


def smallest_number(instructions, dtype):
    """Return the smallest result of a kernel: one instruction set has no subnormal bfloat16."""
    info = torch.finfo(dtype)
    if instructions == "AVX512_BF16" and dtype == torch.bfloat16:
        return info.smallest_normal
    return info.smallest_normal * info.eps


def require_like_eager(label, got, eager, exact, per_sample, rounding=None, smallest=None):
    """Apply the accuracy rule to each row, or to each sample; see the module's docstring."""

    def groups(t):
        return t.double().flatten(1) if per_sample else t.double().flatten(0, -2)

    info, target = torch.finfo(got.dtype), groups(exact.to(got.dtype))
    got, eager, exact = map(groups, (got, eager, exact))
    finite = eager.isfinite() & target.isfinite()
    error, budget, size = (
        torch.where(finite, t, 0).abs().amax(1) for t in (got - exact, eager - exact, exact)
    )
    smallest = smallest or info.smallest_normal * info.eps
    allowed = 2 * budget + (rounding or info.eps) * size + smallest
    wrong = ~(error <= allowed)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise AssertionError(
            f"{label}, group {i}: error {error[i]:.2e}, eager {budget[i]:.2e}, "
            f"largest exact value {size[i]:.2e}, got {got[i].tolist()[:4]}, "
            f"exact {exact[i].tolist()[:4]}"
        )
    infinite = ~eager.isfinite() & ~target.isfinite()
    like_eager, like_target = ((got == t) | (got.isnan() & t.isnan()) for t in (eager, target))
    wrong = infinite & ~like_eager & ~like_target
    assert not wrong.any(), f"{label}: {got[wrong][:4]} instead of {target[wrong][:4]}"


def activations_only(results, leaves):
    """Leave out the gradients of parameters: they add up all samples, NaN included."""
    names = {f"d{name}" for name, t in leaves.items() if not is_activation(t)}
    return {name: t for name, t in results.items() if name not in names}


class TestValueRange:
    variants = {"": None}  # conftest runs each test on every backend

    @pytest.fixture(autouse=True)
    def on_each_backend(self, backend):
        pass

    @pytest.mark.parametrize("operator", OPERATORS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_inputs_of_any_scale_are_as_accurate_as_eager(self, backend, operator, dtype):
        """Parameters and their gradients included."""
        for scale in SCALES:
            by = torch.full((24,), scale / 2, dtype=torch.float64, device="cpu")
            inputs = make(operator, dtype, by, torch.ones_like(by))
            exact, eager = run_exact_and_eager(*inputs)
            for instructions in each_instruction_set(backend):
                got = run(getattr(mv, inputs[0]), *inputs[1:])
                for name, t in got.items():
                    label = f"{inputs[0]}, {instructions}, {dtype}, {scale:g}, {name}"
                    in_range = exact[name].abs().amax() < torch.finfo(t.dtype).max
                    if in_range:
                        require_accurate(label, t, eager[name], exact[name])
                    else:
                        require_like_eager(label, t, eager[name], exact[name], False)

    @pytest.mark.parametrize("operator", OPERATORS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_magnitude(self, backend, operator, dtype):
        op, leaves, *rest = make(operator, dtype, *sweep(dtype))
        exact, eager = run_exact_and_eager(op, leaves, *rest)
        for instructions in each_instruction_set(backend):
            got = activations_only(run(getattr(mv, op), leaves, *rest), leaves)
            for name, t in got.items():
                label = f"{op}, {instructions}, {dtype}, {name}"
                per_sample, smallest = op == "mvsplit_rmsnorm", smallest_number(instructions, dtype)
                require_like_eager(
                    label, t, eager[name], exact[name], per_sample, smallest=smallest
                )

    @pytest.mark.parametrize("operator", OPERATORS)
    def test_every_magnitude_in_float64(self, backend, operator):
        op, leaves, *rest = make(operator, torch.float64, *sweep(torch.float64))
        exact = run(getattr(mv.reference, op), leaves, *rest)
        got = activations_only(run(getattr(mv, op), leaves, *rest), leaves)
        for name, t in got.items():
            per_sample = op == "mvsplit_rmsnorm"
            require_like_eager(f"{op}, {name}", t, exact[name], exact[name], per_sample, 1e-9)

    @pytest.mark.parametrize("operator", OPERATORS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_other_rows_do_not_see_a_bad_one(self, backend, operator, dtype, value):
        """Other samples in a merge with means, whose tokens depend on each other."""
        ones = torch.ones(4, dtype=torch.float64, device="cpu")
        op, leaves, *rest = make(operator, dtype, ones, ones)
        bad = {
            name: t.index_put((torch.tensor(1), torch.tensor(0)), torch.full_like(t[1, 0], value))
            if is_activation(t)
            else t
            for name, t in leaves.items()
        }
        others = torch.ones(4, T, dtype=torch.bool)
        others[1, slice(None) if op == "mvsplit_rmsnorm" else 0] = False
        for instructions in each_instruction_set(backend):
            clean, dirty = (
                activations_only(run(getattr(mv, op), t, *rest), t) for t in (leaves, bad)
            )
            for name in clean:
                label = f"{op}, {instructions}, {name}"
                assert torch.equal(clean[name][others], dirty[name][others]), label
                if value != value:
                    assert dirty[name][1, 0].isnan().any() or op == "rope", label

    @pytest.mark.parametrize("operator", OPERATORS)
    @pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
    def test_rows_of_zeros_have_finite_gradients(self, backend, operator, dtype):
        """Padding tokens are such rows."""
        by = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, device="cpu")
        inputs = make(operator, dtype, by, torch.ones_like(by))
        exact, eager = run_exact_and_eager(*inputs)
        for instructions in each_instruction_set(backend):
            got = run(getattr(mv, inputs[0]), *inputs[1:])
            for name, t in got.items():
                label = f"{inputs[0]}, {instructions}, {dtype}, {name}"
                assert t.isfinite().all() and eager[name].isfinite().all(), label
                if dtype != torch.float64:
                    require_accurate(label, t, eager[name], exact[name])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_statistics_of_large_values_do_not_overflow(self, backend, dtype):
        """The square of 300 exceeds the range of float16."""
        x, heads = (torch.full(s, 300.0, dtype=dtype) for s in ((1, 3, 40), (1, 3, 2, 40)))
        zero, one = torch.zeros(40), torch.ones(40)
        for name in (None, "reference"):
            results = (
                *mv.qk_norm(heads, -heads, backend=name),
                mv.residual_rmsnorm(x, x, backend=name),
                mv.mvsplit_rmsnorm(x, x, zero, one, backend=name),
            )
            assert all(torch.equal(t.abs(), torch.ones_like(t)) for t in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_definitions_are_as_accurate_as_functions_of_pytorch(dtype):
    """qk_norm as F.rms_norm, and swiglu as F.silu in float32, over all magnitudes."""

    def rms_norm(q, k, q_weight):
        return F.rms_norm(q, q.shape[-1:], q_weight.to(q.dtype), 1e-6), F.rms_norm(
            k, k.shape[-1:], None, 1e-6
        )

    def silu(x, up):
        return (F.silu(x.float()) * up.float()).to(x.dtype)

    for operator, eager_code in ((qk_norm, rms_norm), (swiglu, silu)):
        op, leaves, *rest = make(operator, dtype, *sweep(dtype))
        if operator is qk_norm:  # F.rms_norm takes a weight of its own dtype only
            leaves["q_weight"] = leaves["q_weight"].to(dtype).float()
        exact, got = run_exact_and_eager(op, leaves, *rest)
        eager = run(eager_code, leaves, *rest)
        for name, t in activations_only(got, leaves).items():
            require_like_eager(f"{op}, {name}", t, eager[name], exact[name], False)
