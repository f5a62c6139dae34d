"""Tracers, nested tensors, subclasses and other kinds of tensors: as with PyTorch's own ops."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import mvsplit_ops as mv
from tests.op_suite import assert_equal
from tests.transforms.calls import CALLS, calls_of

EVERY_CALL = pytest.mark.parametrize("name", CALLS)
BACKENDS = ("reference", "cpu", "triton", "cuda")
ON_BACKENDS = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
ON_KERNELS = pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)


def results_and_gradients(run, args):
    leaves = [t.detach().clone().requires_grad_() for t in args]
    results = tree_leaves(run(*leaves))
    total = sum(t.square().sum() for t in results if t.requires_grad)
    return [t.detach() for t in results] + list(torch.autograd.grad(total, leaves))


def with_names(run, count):
    """Return run as a function of `count` named arguments, which symbolic_trace needs."""
    names = ", ".join("abcde"[:count])
    return eval(f"lambda {names}: run({names})", {"run": run})


def trace_with_jit(run, args):
    return torch.jit.trace(lambda *tensors: run(*tensors), args)


def trace_with_fx(run, args):
    return torch.fx.symbolic_trace(with_names(run, len(args)))


def trace_real(run, args):
    return make_fx(run)(*args)


def trace_fake(run, args):
    return make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)


def trace_symbolic(run, args):
    return make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*args)


TRACERS = (trace_with_jit, trace_with_fx, trace_real, trace_fake, trace_symbolic)


@EVERY_CALL
@ON_BACKENDS
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_call_gives_the_values_of_other_inputs(name, backend):
    """A tracer that missed the call would return the values of the inputs it was traced with."""
    call, _, args = calls_of(name, backend, tiny=backend != "cpu")
    others = tuple(t + 0.25 for t in args)
    for trace in TRACERS if backend in ("cpu", "reference") else TRACERS[:2]:
        traced = trace(call.run, tuple(args))
        assert_equal(tree_leaves(traced(*others)), tree_leaves(call.run(*others)))
    for trace in TRACERS[:2]:  # which autograd differentiates
        traced = trace(call.run, tuple(args))
        assert_equal(results_and_gradients(traced, others), results_and_gradients(call.run, others))


def test_fx_records_the_public_function():
    graph = torch.fx.symbolic_trace(with_names(mv.residual_rmsnorm, 2)).graph
    (node,) = (n for n in graph.nodes if n.op == "call_function")
    assert node.target is mv.residual_rmsnorm


def test_fx_traces_a_module_that_merges():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.merge = mv.MVSplitRMSNorm(8, init_alpha=0.3)

        def forward(self, x, f):
            return self.merge(x, f, (x.shape[1] - 1, 1))

    model, x, f = Model(), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    traced = torch.fx.symbolic_trace(model)
    for samples in (x, torch.cat((x, x), 1)):
        assert torch.equal(traced(samples, samples + f[:, :1]), model(samples, samples + f[:, :1]))


class Labelled(torch.Tensor):
    """A subclass that does nothing of its own."""


class Logging(torch.Tensor):
    """A subclass that records the functions that are called with it."""

    calls: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@EVERY_CALL
@ON_BACKENDS
def test_subclasses_of_tensor_keep_their_class(name, backend):
    call, _, args = calls_of(name, backend, tiny=True)
    expected = results_and_gradients(call.run, args)
    for i in range(len(args)):
        mixed = [
            t.as_subclass(Labelled) if i in (j, len(args) - 1) else t for j, t in enumerate(args)
        ]
        assert all(type(t) is Labelled for t in tree_leaves(call.run(*mixed)))
        results = results_and_gradients(call.run, mixed)
        assert_equal([t.as_subclass(torch.Tensor) for t in results], expected)


def test_subclasses_see_the_public_function():
    x = torch.randn(2, 8).as_subclass(Logging)
    Logging.calls.clear()
    mv.swiglu(x)
    assert mv.swiglu in Logging.calls


@EVERY_CALL
@ON_KERNELS
def test_meta_tensors_have_the_shapes_and_dtypes_of_results(name, backend):
    call, _, args = calls_of(name, backend, tiny=True)
    args = [t.float() for t in args]
    tables = "rope" in name
    if tables:  # their tables would have to be on meta, too
        with pytest.raises(ValueError, match="cos must be on meta"):
            call.run(*(t.to("meta") for t in args))
        return
    results = tree_leaves(call.run(*(t.to("meta") for t in args)))
    for m, t in zip(results, tree_leaves(call.run(*args)), strict=True):
        assert m.is_meta and (m.shape, m.dtype) == (t.shape, t.dtype)


@EVERY_CALL
@ON_BACKENDS
def test_inference_tensors(name, backend):
    call, _, args = calls_of(name, backend, tiny=True)
    expected = tree_leaves(call.run(*args))
    with torch.inference_mode():
        frozen = [t.clone() for t in args]
        assert_equal(tree_leaves(call.run(*frozen)), expected)
    assert_equal(tree_leaves(call.run(*frozen)), expected)
    if len(args) == 1:
        return
    mixed = [args[0].clone().requires_grad_(), *frozen[1:]]
    try:
        (gradient,) = torch.autograd.grad(call.results(*mixed)[0].sum(), mixed[0])
    except RuntimeError as error:  # PyTorch's own error, which names the remedy
        assert "Inference tensors cannot be saved for backward" in str(error)
    else:  # nothing of them is needed
        leaf = args[0].clone().requires_grad_()
        (expected,) = torch.autograd.grad(call.results(leaf, *args[1:])[0].sum(), leaf)
        assert torch.equal(gradient, expected)


@EVERY_CALL
@ON_BACKENDS
def test_lazily_negated_inputs_are_read_right(name, backend):
    call, _, args = calls_of(name, backend, tiny=True)
    negated = [torch.complex(torch.zeros_like(t), -t).conj().imag for t in args]
    assert all(t.is_neg() for t in negated)
    for a, b in zip(tree_leaves(call.run(*negated)), tree_leaves(call.run(*args)), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_and_quantised_tensors_are_refused(backend):
    x = torch.randn(2, 3, 8)
    for bad in (x.to_sparse(), x[0].to_sparse_csr(), x.to_mkldnn()):
        with pytest.raises(ValueError, match=r"^swiglu: .*\.to_dense\(\)"):
            mv.swiglu(bad, backend=backend)
    with pytest.raises(ValueError, match=r"^residual_rmsnorm: .*\.to_dense\(\)"):
        mv.residual_rmsnorm(x, x.to_sparse(), backend=backend)
    quantised = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    with pytest.raises(ValueError, match=r"^swiglu: .*(dequantize|got qint8)"):
        mv.swiglu(quantised, backend=backend)


def jagged(width, *lengths, like=None, heads=()):
    """Return samples of these lengths as a nested tensor, and as dense tensors."""
    values = torch.randn(sum(lengths), *heads, width, dtype=torch.float64)
    offsets = torch.tensor([0, *lengths]).cumsum(0) if like is None else like.offsets()
    values.requires_grad_()
    nested = torch.nested.nested_tensor_from_jagged(values, offsets)
    return values, nested, list(values.split(lengths))


@ON_BACKENDS
def test_jagged_tensors_are_computed_row_by_row(backend):
    scale = torch.rand(6, dtype=torch.float64, requires_grad=True)
    x, nested_x, xs = jagged(6, 3, 1, 5)
    f, nested_f, fs = jagged(6, 3, 1, 5, like=nested_x)
    q, nested_q, qs = jagged(4, 2, 4, heads=(2,))
    k, nested_k, ks = jagged(4, 2, 4, heads=(1,), like=nested_q)
    cases = (
        (mv.swiglu(nested_x), [mv.swiglu(t) for t in xs], (x,)),
        (
            mv.swiglu(nested_x, nested_f),
            [mv.swiglu(t, u) for t, u in zip(xs, fs, strict=True)],
            (x, f),
        ),
        (
            mv.residual_rmsnorm(nested_x, nested_f, scale),
            [mv.residual_rmsnorm(t[None], u[None], scale)[0] for t, u in zip(xs, fs, strict=True)],
            (x, f, scale),
        ),
        (
            mv.qk_norm(nested_q, nested_k)[0],
            [mv.qk_norm(t[None], u[None])[0][0] for t, u in zip(qs, ks, strict=True)],
            (q,),
        ),
    )
    for nested, samples, leaves in cases:
        assert nested.is_nested and nested.layout == torch.jagged
        expected = torch.cat(samples)
        assert torch.allclose(nested.values(), expected, rtol=1e-12)
        gradients = torch.autograd.grad(nested.values().square().sum(), leaves, retain_graph=True)
        wanted = torch.autograd.grad(expected.square().sum(), leaves)
        for a, b in zip(gradients, wanted, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    total = mv.residual_rmsnorm(nested_x, nested_f) + nested_x  # the same samples as its inputs
    assert total.is_nested


def test_what_nested_tensors_cannot_do_is_refused():
    _, x, _ = jagged(6, 3, 1)
    _, f, _ = jagged(6, 3, 1)
    _, q, _ = jagged(6, 3, 1, heads=(2,))
    a, c = torch.rand(6), torch.rand(3, 3)
    with pytest.raises(ValueError, match="^residual_rmsnorm: .* must have the same offsets"):
        mv.residual_rmsnorm(x, f)
    for call in (
        lambda: mv.mvsplit_rmsnorm(x, x, a, a),
        lambda: mv.rope(q, c, c),
        lambda: mv.rope_qk_norm(q, q, c, c),
    ):
        with pytest.raises(ValueError, match="nested tensors are not supported, .*to_padded"):
            call()
    strided = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)])
    with pytest.raises(ValueError, match=r"^swiglu: .* layout torch.jagged"):
        mv.swiglu(strided)
    with pytest.raises(ValueError, match="nested tensors are not supported"):
        mv.rope(torch.nested.nested_tensor([torch.randn(2, 1, 6)]), c, c)
