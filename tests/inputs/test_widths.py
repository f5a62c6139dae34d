"""Every width D, Dh and F from 1 to 520: right on each backend, or the same ValueError on all."""

import itertools

import pytest
import torch

import mvsplit_ops as mv
from mvsplit_ops import _C
from tests.inputs.runs import (
    each_instruction_set,
    require_all_accurate,
    run,
    run_exact_and_eager,
)

BACKENDS = ("cpu", "triton", "cuda")
SEGMENTS = (3, 1)
T = sum(SEGMENTS)

# Compiled kernels run at every width, interpreted ones around each multiple of a vector or block.
WIDTHS = dict.fromkeys(BACKENDS, range(1, 521))
if not torch.cuda.is_available():
    WIDTHS["triton"] = (1, 2, 3, 4, 5, 8, 9, 16, 31, 33, 64, 129, 256, 257, 520)
    WIDTHS["cuda"] = (1, 2, 3, 8, 9, 33, 64, 129, 256, 520)


def randn(*shape, mean=0.0):
    return mean + torch.randn(shape, dtype=torch.float64)


def swiglu(F):
    return "swiglu", {"x": randn(2, T, 2 * F)}, {}


def swiglu_of_two(F):
    return "swiglu", {"x": randn(2, T, F), "up": randn(2, T, F)}, {}


def tables(Dh):
    angle = 6.3 * torch.rand(T, Dh // 2, dtype=torch.float64)
    return {"cos": angle.cos(), "sin": angle.sin()}


def rope(Dh):
    return "rope", {"x": randn(1, T, 2, Dh)}, tables(Dh)


def qk_norm(Dh):
    return "qk_norm", {"q": randn(1, T, 2, Dh), "k": randn(1, T, 1, Dh)}, {}


def weighted_qk_norm(Dh):
    op, leaves, constants = qk_norm(Dh)
    return op, {**leaves, "q_weight": randn(Dh, mean=1.0), "k_weight": randn(Dh)}, constants


def rope_qk_norm(Dh):
    _, leaves, _ = qk_norm(Dh)
    return "rope_qk_norm", leaves, tables(Dh)


def norm_first(Dh):
    _, leaves, _ = weighted_qk_norm(Dh)
    return "rope_qk_norm", leaves, {**tables(Dh), "norm_first": True, "interleaved": True}


def residual(D):
    leaves = {"x": randn(1, T, D), "f": randn(1, T, D)}
    return "residual_rmsnorm", {**leaves, "scale": randn(D), "weight": randn(D, mean=1.0)}, {}


def mvsplit(D):
    leaves = {"x": randn(1, T, D), "f": randn(1, T, D), "alpha": randn(D), "beta": randn(D)}
    return "mvsplit_rmsnorm", leaves, {"segments": SEGMENTS}


def weighted_mvsplit(D):
    op, leaves, constants = mvsplit(D)
    return op, {**leaves, "weight": randn(D, mean=1.0)}, constants


ROTATED = (rope, rope_qk_norm, norm_first)
OPERATORS = (
    *(swiglu, swiglu_of_two, qk_norm, weighted_qk_norm, *ROTATED),
    *(residual, mvsplit, weighted_mvsplit),
)
FEWER = [*range(1, 70), *range(71, 521, 7)]
ON_EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def widths_of(operator, backend):
    return [n for n in WIDTHS[backend] if operator not in ROTATED or n % 2 == 0]


def cotangents_of(op, leaves):
    shapes = [t.shape for name, t in leaves.items() if name in ("x", "q", "k")]
    if op == "swiglu" and "up" not in leaves:
        shapes = [(*shapes[0][:-1], shapes[0][-1] // 2)]
    return [randn(*shape) for shape in shapes]


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Results do not depend on it, and small inputs are faster."""
    threads(1)


@pytest.fixture
def use_another_instruction_set():
    """Return a function that sets one of the cpu backend: each meets each remainder of 16."""
    before, names = _C.capability(), _C.capabilities()
    yield lambda width: _C.set_capability(names[(width + width // 16) % len(names)])
    _C.set_capability(before)


@ON_EACH_BACKEND
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_width_equals_the_definition(operator, backend, use_another_instruction_set):
    for width in widths_of(operator, backend):
        op, leaves, constants = operator(width)
        cotangents = cotangents_of(op, leaves)
        exact = run(getattr(mv.reference, op), leaves, constants, cotangents)
        use_another_instruction_set(width)
        got = run(getattr(mv, op), leaves, constants, cotangents)
        for name in exact:
            label = f"{op}, {_C.capability()}, width {width}, {name}"
            assert got[name].shape == exact[name].shape, label
            assert torch.allclose(got[name], exact[name], rtol=1e-9, atol=1e-10), label


@ON_EACH_BACKEND
@pytest.mark.parametrize("operator", [o for o in OPERATORS if o is not mvsplit])
def test_widths_are_as_accurate_as_eager(operator, backend):
    """The rule compares largest errors, so it judges the widths of a block together."""
    for first, dtype in itertools.product(range(0, 521, 24), (torch.float32, torch.bfloat16)):
        block = [n for n in FEWER if first <= n < first + 24]
        widths = [n for n in widths_of(operator, backend) if n in block]
        if backend != "cpu" and dtype != torch.float32:
            widths = widths[-1:]
        calls = [operator(width) for width in widths]
        cotangents = [cotangents_of(op, leaves) for op, leaves, _ in calls]
        inputs = [
            (op, *(to(dtype, t) for t in arguments), [t.to(dtype) for t in dy])
            for (op, *arguments), dy in zip(calls, cotangents, strict=True)
        ]
        if not inputs:
            continue
        exact, eager = map(pool, zip(*(run_exact_and_eager(*call) for call in inputs), strict=True))
        for instructions in each_instruction_set(backend):
            got = pool([run(getattr(mv, op), *call) for op, *call in inputs])
            label = f"{inputs[0][0]}, {instructions}, {dtype}, widths {widths[0]} to {widths[-1]}"
            require_all_accurate(label, got, eager, exact)


def to(dtype, arguments):
    """Return activations in a dtype, and parameters and tables in float32."""
    return {
        name: t.to(dtype if t.dim() > 2 else torch.float32) if isinstance(t, torch.Tensor) else t
        for name, t in arguments.items()
    }


def pool(runs):
    """Return one tensor for each result and gradient, with the elements of all runs."""
    return {name: torch.cat([r[name].flatten() for r in runs]) for name in runs[0]}


def test_other_widths_raise_the_same_error_on_every_backend():
    odd = [(operator, width) for operator in ROTATED for width in range(1, 521, 2)]
    empty = [(o, 0) for o in OPERATORS if o not in (swiglu, swiglu_of_two)]
    for operator, width in (*odd, *empty):
        op, leaves, constants = operator(width)
        messages = set()
        for backend in (*BACKENDS, "reference"):
            with pytest.raises(ValueError, match=f"^{op}: ") as error:
                getattr(mv, op)(**leaves, **constants, backend=backend)
            messages.add(str(error.value))
        assert len(messages) == 1, messages


@ON_EACH_BACKEND
def test_a_swiglu_of_width_zero_is_empty(backend):
    for op, leaves, _ in (swiglu(0), swiglu_of_two(0)):
        results = run(getattr(mv, op), leaves, {}, cotangents_of(op, leaves))
        assert {name: t.numel() for name, t in results.items()} == dict.fromkeys(results, 0)
