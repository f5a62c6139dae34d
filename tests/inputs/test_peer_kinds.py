"""Kinds of input that the tests of other libraries of such operators have."""

import pytest
import torch

import mvsplit_ops as mv
from tests.inputs import test_structured_values as structured
from tests.inputs.runs import (
    each_instruction_set,
    require_all_accurate,
    run,
    run_exact_and_eager,
)

# (B, segments, width). Widths of models, of one vector more or less, and the smallest.
SHAPES = {
    "one odd row": (1, (1,), 111),
    "rows of a large model": (1, (2, 1), 3584),
    "one more than a vector": (3, (2, 5), 65),
    "one less than a vector": (3, (2, 5), 63),
    "few columns": (7, (3, 4), 8),
    "many tokens": (1, (99, 19), 34),
}
SMALL = (2, (3, 2), 48)


def swiglu(structure, g, B, segments, D):
    x = structure(g, B, sum(segments), 2 * D)
    return "swiglu", {"x": x}, {}


def two_tensors(structure, g, B, segments, D):
    gate, up = (structure(g, B, sum(segments), D) for _ in range(2))
    return "swiglu", {"x": gate, "up": up}, {}


def rope(structure, g, B, segments, D):
    _, _, tables = structured.rope_qk_norm(structure, g, B, segments, D)
    return "rope", {"x": structure(g, B, sum(segments), 1, D // 2 * 2)}, tables


def grouped_queries(structure, g, B, segments, D):
    """Eight heads of q and one of k."""
    op, leaves, tables = structured.rope_qk_norm(structure, g, B, segments, D)
    return op, {**leaves, "q": structure(g, B, sum(segments), 8, D // 2 * 2)}, tables


MERGES = (structured.mvsplit, structured.weighted_mvsplit, structured.residual)
NORMS = (grouped_queries, structured.qk_norm, structured.weighted_qk_norm, *MERGES)
OPERATORS = (swiglu, two_tensors, rope, *NORMS)
DTYPES = (torch.float32, torch.bfloat16)


def pool(runs):
    """Return the results of several runs as one."""
    return {name: torch.stack([t[name] for t in runs]) for name in runs[0]}


def make(operator, shape, dtype, change=lambda name, t: t, seed=0):
    """Return (op, leaves, constants, cotangents), with each leaf replaced by change(name, leaf)."""
    g, device = torch.Generator("cpu").manual_seed(seed), torch.get_default_device()
    B, segments, width = shape
    with torch.device("cpu"):
        op, leaves, constants = operator(structured.normal, g, B, segments, width)
        leaves = {name: change(name, t) for name, t in leaves.items()}
        results = [leaves["x"]] if "x" in leaves else [leaves["q"], leaves["k"]]
        halves = op == "swiglu" and "up" not in leaves
        cotangents = [
            structured.normal(g, *t.shape[:-1], t.shape[-1] // (1 + halves)) for t in results
        ]

    def prepare(t):
        return t.to(device, dtype if t.dim() > 2 else None) if isinstance(t, torch.Tensor) else t

    leaves, constants = ({k: prepare(t) for k, t in a.items()} for a in (leaves, constants))
    return op, leaves, constants, [prepare(t) for t in cotangents]


def misaligned(t):
    """Return a view whose rows begin one element after the start of rows of a wider tensor."""
    wide = torch.cat((t[..., :1], t, t[..., :2]), -1)
    return wide[..., 1:-2]


class TestPeerKinds:
    variants = {"": None}  # conftest runs each test on every backend

    @pytest.fixture(autouse=True)
    def on_each_backend(self, backend):
        pass

    def _check(self, backend, op, *inputs):
        exact, eager = run_exact_and_eager(op, *inputs)
        for instructions in each_instruction_set(backend):
            got = run(getattr(mv, op), *inputs)
            require_all_accurate(f"{op}, {instructions}", got, eager, exact)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("operator", OPERATORS)
    def test_shapes(self, backend, operator, shape):
        # The largest of few errors depends on chance: small shapes are judged in sixteen samples.
        B, segments, width = SHAPES[shape]
        seeds = range(1 if B * sum(segments) * width > 1000 else 16)
        for dtype in DTYPES:
            samples = [make(operator, SHAPES[shape], dtype, seed=seed) for seed in seeds]
            exact, eager = (
                pool(runs) for runs in zip(*(run_exact_and_eager(*s) for s in samples), strict=True)
            )
            for instructions in each_instruction_set(backend):
                got = pool([run(getattr(mv, op), *inputs) for op, *inputs in samples])
                require_all_accurate(f"{instructions}, {dtype}", got, eager, exact)

    @pytest.mark.parametrize("operator", NORMS)
    @pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3])
    def test_epsilons(self, backend, operator, eps):
        for dtype in DTYPES:
            op, leaves, constants, cotangents = make(operator, SMALL, dtype)
            self._check(backend, op, leaves, {**constants, "eps": eps}, cotangents)

    @pytest.mark.parametrize("operator", NORMS)
    def test_weights_around_zero(self, backend, operator):
        """As those that a model adds to one, and exact zeros."""

        def centre(name, t):
            return t if t.dim() > 2 else (t - t.mean()) * (torch.arange(len(t)) % 3).sign()

        for dtype in DTYPES:
            self._check(backend, *make(operator, SMALL, dtype, centre))

    @pytest.mark.parametrize("operator", OPERATORS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_rows_that_are_not_aligned(self, backend, operator, dtype):
        op, leaves, *rest = make(operator, SMALL, dtype)
        self._check(backend, op, {name: misaligned(t) for name, t in leaves.items()}, *rest)

    def test_tables_that_begin_at_a_later_position(self, backend):
        op, leaves, tables, cotangents = make(rope, SMALL, torch.float32)
        T = leaves["x"].shape[1]
        longer = {name: torch.cat((t * 2, t, t * 3)) for name, t in tables.items()}
        later = {name: t[T : 2 * T] for name, t in longer.items()}
        for _ in each_instruction_set(backend):
            got, want = (run(mv.rope, leaves, t, cotangents) for t in (later, tables))
            assert all(torch.equal(t, want[name]) for name, t in got.items())

    @pytest.mark.parametrize(
        "operator", [swiglu, two_tensors, rope, structured.qk_norm, structured.residual]
    )
    def test_no_tokens(self, backend, operator):
        op, leaves, constants, cotangents = make(operator, (2, (0,), 8), torch.float32)
        for name, t in run(getattr(mv, op), leaves, constants, cotangents).items():
            expected = leaves.get(name[1:], cotangents[0])
            assert t.shape == expected.shape and not t.count_nonzero(), name
