"""One graph of torch.compile and torch.export for every batch and token count."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import mvsplit_ops as mv

D, H, DH, F, MOST_TOKENS = 16, 4, 8, 12, 512
SIZES = ((3, 17), (5, 33), (2, 70), (7, 9))  # (B, T); no B and T equal a width
GAIN = torch.linspace(0.5, 1.5, D)
ANGLE = torch.arange(MOST_TOKENS)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
COS, SIN = ANGLE.cos(), ANGLE.sin()


def sliced_tables(x, **options):
    return mv.rope(x, COS[: x.shape[1]], SIN[: x.shape[1]], **options)


def long_tables(x):
    return mv.rope(x, COS, SIN)


def full_width_tables(x):
    cos, sin = COS[: x.shape[1]], SIN[: x.shape[1]]
    return mv.rope(x, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))


def heads_in_one_pass(q, k):
    return mv.rope_qk_norm(q, k, COS[: q.shape[1]], SIN[: q.shape[1]])


def one_segment(x, f):
    return mv.mvsplit_rmsnorm(x, f, GAIN, GAIN, GAIN)


def segments_from_a_shape(x, f):
    return mv.mvsplit_rmsnorm(x, f, GAIN, GAIN, segments=(x.shape[1] - 4, 4))


def segments_of_two_inputs(x, f):
    both = torch.cat((x, f), 1)
    return mv.mvsplit_rmsnorm(both, -both, GAIN, GAIN, segments=(x.shape[1], f.shape[1]))


def two_merges(x, f):
    y, jy = mv.mvsplit_rmsnorm_with_mean(x, f, GAIN, GAIN)
    return mv.mvsplit_rmsnorm_with_mean(y, f, GAIN, GAIN, jx=jy)[0]


def residual(x, f):
    return mv.residual_rmsnorm(x, f, GAIN, GAIN)


def head(b, t):
    return (b, t, H, DH)


# {function: shapes of its inputs for B and T}
FUNCTIONS = {
    mv.swiglu: lambda b, t: [(b, t, 2 * F)],
    sliced_tables: lambda b, t: [head(b, t)],
    long_tables: lambda b, t: [head(b, t)],
    full_width_tables: lambda b, t: [head(b, t)],
    mv.rope: lambda b, t: [head(b, t), (b, t, DH // 2), (b, t, DH // 2)],
    mv.qk_norm: lambda b, t: [head(b, t), head(b, t)],
    heads_in_one_pass: lambda b, t: [head(b, t), head(b, t)],
    one_segment: lambda b, t: [(b, t, D)] * 2,
    segments_from_a_shape: lambda b, t: [(b, t, D)] * 2,
    segments_of_two_inputs: lambda b, t: [(b, t, D)] * 2,
    two_merges: lambda b, t: [(b, t, D)] * 2,
    residual: lambda b, t: [(b, t, D)] * 2,
}
EVERY_FUNCTION = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
EACH_KIND_OF_BACKEND = pytest.mark.parametrize("backend", ["cpu", "reference"])


def inputs_of(function, b, t):
    return [torch.randn(s) for s in FUNCTIONS[function](b, t)]


def dynamic_dims(t, b, tokens):
    return [i for i, n in enumerate(t.shape) if n in (b, tokens)]


def require_one_graph(compiled, function, mark):
    counters.clear()
    for b, t in SIZES:
        tensors = inputs_of(function, b, t)
        tables = function is mv.rope
        leaves = [x.requires_grad_(not (tables and i)) for i, x in enumerate(tensors)]
        if mark:
            for x in leaves:
                for dim in dynamic_dims(x, b, t):
                    torch._dynamo.mark_dynamic(x, dim)
        results = tree_leaves(compiled(*leaves))
        expected = tree_leaves(function(*leaves))
        for a, e in zip(results, expected, strict=True):
            assert torch.allclose(a, e, atol=1e-6)
        wanted = [x for x in leaves if x.requires_grad]
        for a, e in zip(
            torch.autograd.grad([r.square().sum() for r in results], wanted),
            torch.autograd.grad([r.square().sum() for r in expected], wanted),
            strict=True,
        ):
            assert torch.allclose(a, e, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@EVERY_FUNCTION
@pytest.mark.parametrize(
    ("backend", "mark"), [("cpu", True), ("cpu", False), ("reference", True)]
)  # mark: mark_dynamic instead of dynamic=True
def test_one_compiled_graph_serves_all_sizes(function, backend, mark):
    torch.compiler.reset()
    dynamic = None if mark else True
    with mv.use_backend(backend):
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        require_one_graph(compiled, function, mark)


EXPORTS = [(f, False) for f in FUNCTIONS] + [(f, True) for f in (mv.swiglu, mv.rope, mv.qk_norm)]


@pytest.mark.parametrize(("function", "strict"), EXPORTS)
@EACH_KIND_OF_BACKEND
def test_one_exported_program_serves_all_sizes(function, backend, strict):
    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    torch.compiler.reset()
    first = inputs_of(function, *SIZES[0])
    dims = tuple({d: torch.export.Dim.DYNAMIC for d in dynamic_dims(x, *SIZES[0])} for x in first)
    with mv.use_backend(backend):
        program = torch.export.export(
            Model(), tuple(first), dynamic_shapes=(dims,), strict=strict
        ).module()
        for b, t in SIZES:
            tensors = inputs_of(function, b, t)
            results, expected = program(*tensors), function(*tensors)
            for a, e in zip(tree_leaves(results), tree_leaves(expected), strict=True):
                assert torch.allclose(a, e, atol=1e-6)


@EACH_KIND_OF_BACKEND
def test_token_counts_that_are_data_stay_symbolic(backend):
    def merge(x, f, count):
        n = count.item()
        torch._check(n >= 1)
        torch._check(n < x.shape[1])
        return mv.mvsplit_rmsnorm(x, f, GAIN, GAIN, segments=(n, x.shape[1] - n))

    torch.compiler.reset()
    x, f = torch.randn(2, 9, D), torch.randn(2, 9, D)
    with torch._dynamo.config.patch(capture_scalar_outputs=True), mv.use_backend(backend):
        compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
        counters.clear()
        for n in (2, 5, 7):
            count = torch.tensor(n)
            assert torch.allclose(compiled(x, f, count), merge(x, f, count), atol=1e-6)
        assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_wrong_size_is_still_refused_by_a_dynamic_graph(backend):
    torch.compiler.reset()
    compiled = torch.compile(
        segments_of_two_inputs, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with mv.use_backend(backend):
        compiled(torch.randn(2, 9, D), torch.randn(2, 9, D))
        with pytest.raises(Exception, match="shape|size|match"):
            compiled(torch.randn(2, 9, D), torch.randn(3, 9, D))
        bad = torch.compile(
            lambda x: mv.mvsplit_rmsnorm(x, x, GAIN, GAIN, segments=(x.shape[1], 1)),
            fullgraph=True,
            dynamic=True,
            backend="aot_eager",
        )
        with pytest.raises(Exception, match="segments must be token counts that sum to T"):
            bad(torch.randn(2, 9, D))
