"""Sums of values that do not average out, over rows, tokens and heads, of every operator."""

import itertools

import pytest
import torch

import mvsplit_ops as mv
from bench.common.accuracy import require_accurate
from mvsplit_ops.reference import segment_means
from tests.inputs.runs import (
    each_instruction_set,
    require_all_accurate,
    run,
    run_exact_and_eager,
)

GPU = torch.cuda.is_available()


def normal(g, *shape):
    return torch.randn(shape, generator=g)


def constant_rows(g, *shape):
    """Return rows of one value each: the sum of a row is its width times the value."""
    return torch.randn(*shape[:-1], 1, generator=g).expand(shape)


def equal_tokens(g, *shape):
    """Return tokens that are all equal, as those of a collapsed block."""
    return torch.randn(shape[0], 1, *shape[2:], generator=g).expand(shape)


def large_mean(g, *shape):
    """Return tokens with small differences from a mean that is a hundred times larger."""
    mean = 100 * torch.randn(shape[0], 1, *shape[2:], generator=g)
    return mean + torch.randn(shape, generator=g)


def alternating(g, *shape):
    """Return values whose signs alternate along tokens and rows: their sums are small."""
    tokens, columns = (torch.arange(n) for n in (shape[1], shape[-1]))
    signs = 1 - 2.0 * ((tokens[:, None] + columns) % 2)
    signs = signs.view(shape[1], *[1] * (len(shape) - 3), shape[-1])
    sizes = 1 + torch.rand(shape[-1], generator=g)
    return signs * (sizes + 0.2 * torch.randn(shape, generator=g))


def one_outlier(g, *shape):
    """Return rows in which one value, elsewhere in each, is large; its sign is its column's."""
    values = torch.randn(shape, generator=g)
    place = torch.randint(shape[-1], (*shape[:-1], 1), generator=g)
    signs = torch.randn(shape[-1], generator=g).sign().expand(shape)
    large = (100 + 100 * values.gather(-1, place).abs()) * signs.gather(-1, place)
    return values.scatter(-1, place, large)


STRUCTURES = (constant_rows, equal_tokens, large_mean, alternating, one_outlier)

# (B, segments, width): long sums over rows, over tokens, over both. The rule compares largest
# errors, so there are many sums of each kind. An interpreted kernel takes a millisecond where a
# compiled one takes a microsecond.
SHAPES = {
    "cpu": ((4, (3, 1), 8_192), (1, (4_000, 96), 32), (2, (100, 60), 129)),
    "triton": ((4, (2, 1), 256), (2, (120, 6), 16), (4, (10, 6), 65)),
    "cuda": ((4, (3, 1), 8_192), (1, (2_000, 48), 8), (2, (40, 24), 129)),
}
LONGEST = {
    "cpu": ((1, (2, 1), 262_144), (1, (262_000, 144), 8)),
    "triton": ((1, (1,), 2_048), (1, (600,), 8)),
    "cuda": ((1, (2, 1), 10_240), (1, (8_000, 192), 8)),
}
if GPU:
    SHAPES = dict.fromkeys(SHAPES, SHAPES["cpu"])
    LONGEST = {backend: (LONGEST[backend][0], LONGEST["cpu"][1]) for backend in LONGEST}
WIDEST_HEAD = {"cpu": 262_144, "triton": 4_096, "cuda": 4_096}


def gains(g, width, mean):
    return mean + 0.1 * torch.randn(width, generator=g)


def merge(structure, g, B, segments, D):
    """Return the inputs of both merges."""
    x, f = (structure(g, B, sum(segments), D) for _ in "xf")
    return {"x": x, "f": f, "alpha": gains(g, D, 0.2), "beta": gains(g, D, 1.0)}


def mvsplit(structure, g, B, segments, D):
    return "mvsplit_rmsnorm", merge(structure, g, B, segments, D), {"segments": segments}


def weighted_mvsplit(structure, g, B, segments, D):
    op, leaves, constants = mvsplit(structure, g, B, segments, D)
    return op, {**leaves, "weight": gains(g, D, 1.0)}, constants


def mvsplit_of_differences(structure, g, B, segments, D):
    """With alpha = 0 the mean of f cancels: only the differences from it reach the result."""
    op, leaves, constants = mvsplit(structure, g, B, segments, D)
    small = {"x": leaves["x"] * 0.01, "alpha": leaves["alpha"] * 0}
    return op, {**leaves, **small}, constants


def residual(structure, g, B, segments, D):
    leaves = merge(structure, g, B, segments, D)
    return (
        "residual_rmsnorm",
        {"x": leaves["x"], "f": leaves["f"], "scale": leaves["alpha"], "weight": leaves["beta"]},
        {},
    )


def qk_norm(structure, g, B, segments, D):
    """One head as wide as the shape."""
    q, k = (structure(g, B, sum(segments), 1, D) for _ in "qk")
    return "qk_norm", {"q": q, "k": k}, {}


def weighted_qk_norm(structure, g, B, segments, D):
    op, leaves, constants = qk_norm(structure, g, B, segments, D)
    return op, {**leaves, "q_weight": gains(g, D, 1.0), "k_weight": gains(g, D, 1.0)}, constants


def rope_qk_norm(structure, g, B, segments, D):
    _, leaves, _ = weighted_qk_norm(structure, g, B, segments, D // 2 * 2)
    angle = 6.3 * torch.rand(sum(segments), D // 2, generator=g)
    return "rope_qk_norm", leaves, {"cos": angle.cos(), "sin": angle.sin()}


HEADS = (qk_norm, weighted_qk_norm, rope_qk_norm)
OPERATORS = (mvsplit, weighted_mvsplit, residual, *HEADS)
CALLS = (
    *itertools.product(OPERATORS, STRUCTURES),
    *((mvsplit_of_differences, structure) for structure in (equal_tokens, large_mean)),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(operator, structure, shape, dtype, backend):
    """Return the name of an operator, its leaves and constants, and cotangents."""
    B, segments, width = shape
    if operator in HEADS:
        width = min(width, WIDEST_HEAD[backend])
    g, device = torch.Generator("cpu").manual_seed(0), torch.get_default_device()
    with torch.device("cpu"):
        op, leaves, constants = operator(structure, g, B, segments, width)
        results = [t for name, t in leaves.items() if name in ("x", "q", "k")]
        # One row for all tokens gives long sums over tokens. Where those sums, or gradients along
        # the row itself, would almost vanish, an error would be the luck of a few roundings.
        long_sums = structure in (equal_tokens, large_mean)
        cotangents = [(equal_tokens if long_sums else normal)(g, *t.shape) for t in results]

    def prepare(t):
        return t.to(device, dtype if t.dim() > 2 else None) if isinstance(t, torch.Tensor) else t

    leaves, constants = ({k: prepare(t) for k, t in a.items()} for a in (leaves, constants))
    return op, leaves, constants, [prepare(t) for t in cotangents]


class TestStructuredValues:
    variants = {"": None}  # conftest runs each test on every backend

    @pytest.fixture(autouse=True)
    def on_each_backend(self, backend):
        pass

    @pytest.mark.parametrize(("operator", "structure"), CALLS)
    def test_sums_are_as_accurate_as_eager(self, backend, operator, structure):
        for shape in SHAPES[backend]:
            self._check(backend, *make(operator, structure, shape, torch.float32, backend))

    @pytest.mark.parametrize(("operator", "structure"), CALLS)
    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    def test_sums_of_16_bit_values_are_as_accurate_as_eager(
        self, backend, operator, structure, dtype
    ):
        shape = SHAPES[backend][-1]
        self._check(backend, *make(operator, structure, shape, dtype, backend))

    @pytest.mark.parametrize("structure", STRUCTURES)
    @pytest.mark.parametrize("operator", [weighted_mvsplit, residual])
    def test_the_longest_sums_are_as_accurate_as_eager(self, backend, operator, structure):
        for shape in LONGEST[backend]:
            inputs = make(operator, structure, shape, torch.float32, backend)
            with_gradients = structure in (constant_rows, equal_tokens)
            self._check(backend, *(inputs if with_gradients else (*inputs[:-1], [])))

    def _check(self, backend, op, *inputs):
        exact, eager = run_exact_and_eager(op, *inputs)
        for instructions in each_instruction_set(backend):
            got = run(getattr(mv, op), *inputs)
            shape = tuple(exact["result 0"].shape)
            require_all_accurate(f"{op}, {instructions}, {shape}", got, eager, exact)

    @pytest.mark.parametrize("structure", STRUCTURES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_returned_mean_is_as_accurate_as_eager(self, backend, structure, dtype):
        """It is the mean of the result as it is stored, whatever error that has."""
        long = SHAPES[backend][:2] + LONGEST[backend][-1:] if dtype == torch.float32 else ()
        for shape in (*long, SHAPES[backend][-1]):
            _, leaves, constants, _ = make(mvsplit, structure, shape, dtype, backend)
            for instructions in each_instruction_set(backend):
                y, jy = mv.mvsplit_rmsnorm_with_mean(**leaves, **constants)
                exact, eager = (segment_means(t, shape[1]) for t in (y.double(), y))
                require_accurate(f"mean, {instructions}, {shape}", jy, eager, exact)

    @pytest.mark.parametrize("T", [2, 3, 100, 999, 4096, 5000])
    def test_equal_tokens_have_themselves_as_their_mean(self, backend, T):
        """With alpha = beta = 1 and f = 0 the merge is RMSNorm(x - J x): zero for equal tokens."""
        if backend != "cpu" and not GPU:
            T = min(T, 1000)
        x = torch.randn(2, 1, 48).expand(2, T, 48)
        one, zero = torch.ones(48), torch.zeros(2, T, 48)
        allowed = 2 * torch.finfo(torch.float32).eps * x.abs().max().item()  # of sum and quotient
        for _ in each_instruction_set(backend):
            y = mv.mvsplit_rmsnorm(x, zero, one, one, eps=1.0)
            assert y.abs().max().item() <= allowed
