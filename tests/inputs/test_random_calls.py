"""Calls drawn at random: shapes, memory layouts, dtypes, forms and subsets of inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mvsplit_ops as mv
from mvsplit_ops._host import accumulator_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
EXAMPLES = {"cpu": 150, "triton": 3, "cuda": 20}


@st.composite
def tensors(draw, shape, dtype):
    """Draw a tensor of a shape with any layout: dimensions in any order, gaps, or repeated."""
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.sampled_from((1, 1, 2)), min_size=len(shape), max_size=len(shape)))
    start = draw(st.integers(0, 2))
    seed = draw(st.integers(0, 2**16))
    sizes = [shape[d] * steps[d] + start for d in order]
    generator = torch.Generator("cpu").manual_seed(seed)
    memory = torch.randn(sizes, generator=generator, dtype=torch.float64, device="cpu")
    memory = memory.to(torch.get_default_device()).to(dtype)
    t = memory.permute([order.index(d) for d in range(len(shape))])
    windows = zip(shape, steps, strict=True)
    t = t[tuple(slice(start, start + n * step, step) for n, step in windows)]
    if len(shape) > 1 and draw(st.booleans()):
        d = draw(st.integers(0, len(shape) - 1))
        t = t.narrow(d, 0, 1).expand(shape)
    assert tuple(t.shape) == tuple(shape)
    return t


@st.composite
def calls(draw):
    """Draw an operator with its tensors, its options, and which tensors require grad."""
    op = draw(
        st.sampled_from(
            ("swiglu", "rope", "qk_norm", "rope_qk_norm", "mvsplit_rmsnorm", "residual_rmsnorm")
        )
    )
    dtype = draw(st.sampled_from(DTYPES))
    small = draw(st.sampled_from(sorted({dtype, torch.float32}, key=str)))
    b, t, h = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    width = draw(st.integers(1, 40))
    options, constants = {}, ()
    if op == "swiglu":
        two = draw(st.booleans())
        lead = draw(st.sampled_from(((), (b,), (b, t), (b, h, t))))
        shapes = [(*lead, width)] * 2 if two else [(*lead, 2 * width)]
        options = {} if two else {"gate_first": draw(st.booleans())}
        parameters = []
    elif op in ("rope", "qk_norm", "rope_qk_norm"):
        dh = width if op == "qk_norm" else 2 * width
        shapes = [(b, t, h, dh)] if op == "rope" else [(b, t, h, dh), (b, t, 1, dh)]
        parameters = [] if op == "rope" else [(dh,)] * draw(st.integers(0, 2))
        if op != "qk_norm":
            lead = draw(st.sampled_from(((), (1,), (b,))))
            sizes = (*lead, t + draw(st.integers(0, 2)), dh // 2)
            table_dtype = draw(st.sampled_from(DTYPES))
            constants = tuple(draw(tensors(sizes, table_dtype)) for _ in "cs")
            options = {"interleaved": draw(st.booleans()), "conjugate": draw(st.booleans())}
            if op == "rope_qk_norm":
                options["norm_first"] = draw(st.booleans())
    else:
        shapes = [(b, t, width)] * 2
        count = {"mvsplit_rmsnorm": st.integers(2, 3), "residual_rmsnorm": st.integers(0, 2)}[op]
        parameters = [(width,)] * draw(count)
        if op == "mvsplit_rmsnorm" and t > 1:
            first = draw(st.integers(1, t - 1))
            options = {"segments": (first, t - first)}
    activations = [draw(tensors(s, dtype)) for s in shapes]
    weights = [draw(tensors(s, small)) for s in parameters]
    subset = draw(st.lists(st.booleans(), min_size=len(shapes + parameters), max_size=9))
    return op, activations, constants, weights, options, subset


def run_call(op, activations, constants, weights, options, subset, backend):
    """Return the results, and the gradients of the tensors of a subset."""
    leaves = [
        t.detach().requires_grad_(s) for t, s in zip((*activations, *weights), subset, strict=False)
    ]
    count = len(activations)
    results = getattr(mv, op)(
        *leaves[:count], *constants, *leaves[count:], **options, backend=backend
    )
    results = results if isinstance(results, tuple) else (results,)
    wanted = [t for t in leaves if t.requires_grad]
    if not wanted:
        return list(results)
    total = sum((t.double() * torch.cos(torch.arange(t.numel())).view_as(t)).sum() for t in results)
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, wanted)]  # noqa: B905
    return [t.detach() for t in (*results, *gradients)]


@pytest.mark.parametrize("backend", EXAMPLES, indirect=True)
def test_calls_drawn_at_random_equal_the_definition(backend):
    examples = settings(max_examples=EXAMPLES[backend], deadline=None, derandomize=True)

    @examples
    @given(call=calls())
    def run(call):
        op, activations, constants, weights, options, subset = call
        dtype = activations[0].dtype
        arithmetic = accumulator_dtype(dtype)
        got = run_call(*call, backend=backend)
        exact = run_call(
            op,
            [t.double() for t in activations],
            [t.to(arithmetic).double() for t in constants],
            [t.double() for t in weights],
            options,
            subset,
            "reference",
        )
        for a, e in zip(got, exact, strict=True):
            scale = max(e.abs().max().item(), 1.0) if e.numel() else 1.0
            assert a.shape == e.shape
            tolerance = max(TOLERANCE[dtype], TOLERANCE[a.dtype])  # a weight may have fewer bits
            assert (a.double() - e).abs().max().item() <= tolerance * scale

    run()
