"""Inputs and gradients that share memory, have odd layouts, or change between the passes."""

import itertools

import pytest
import torch
from torch.utils._pytree import tree_leaves

import mvsplit_ops as mv
from tests.op_suite import assert_equal
from tests.transforms.calls import CALLS, D, calls_of, doubles

BACKENDS = ("reference", "cpu", "triton", "cuda")
EVERY_CALL = pytest.mark.parametrize("name", CALLS)
ON_BACKENDS = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
ON_KERNELS = pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)


def assert_close(results, expected):
    for a, b in zip(results, expected, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def results_and_gradients(call, args, leaves, layout=torch.clone):
    """Return the results of a call, and the gradients of leaves from cotangents of a layout."""
    results = call.results(*args)
    cotangents = [layout(t.detach().cos()) for t in results]
    gradients = torch.autograd.grad(results, leaves, cotangents)
    return [t.detach() for t in results] + list(gradients)


@EVERY_CALL
@ON_BACKENDS
def test_each_subset_of_inputs_that_require_grad(name, backend):
    """The 2^n subsets give the gradients of the full set, and no others."""
    call, exact, args = calls_of(name, backend, tiny=backend in ("triton", "cuda"))
    leaves = [t.clone().requires_grad_() for t in args]
    expected = results_and_gradients(exact, leaves, leaves)[-len(args) :]
    subsets = list(itertools.product((True, False), repeat=len(args)))
    for subset in subsets if backend == "cpu" else (*subsets[:2], *subsets[-3:]):
        leaves = [t.clone().requires_grad_(s) for t, s in zip(args, subset, strict=True)]
        wanted = [t for t in leaves if t.requires_grad]
        results = call.results(*leaves)
        assert all(t.requires_grad == any(subset) for t in results) or "qk_norm" in name
        if not wanted:
            continue
        used = [t for t in results if t.requires_grad]
        gradients = torch.autograd.grad(used, wanted, [t.detach().cos() for t in used])
        assert_close(gradients, [g for g, s in zip(expected, subset, strict=True) if s])


@pytest.mark.parametrize("operator", ["mvsplit_rmsnorm", "residual_rmsnorm", "swiglu", "qk_norm"])
@ON_BACKENDS
def test_the_same_tensor_as_both_inputs(operator, backend):
    x, a = doubles((2, 5, D)), doubles((D,))
    calls = {
        "mvsplit_rmsnorm": lambda x, f: (mv.mvsplit_rmsnorm(x, f, a, a),),
        "residual_rmsnorm": lambda x, f: (mv.residual_rmsnorm(x, f, a),),
        "swiglu": lambda x, f: (mv.swiglu(x, f),),
        "qk_norm": lambda x, f: mv.qk_norm(x[:, :, None], f[:, :, None]),
    }
    run = calls[operator]
    both, first, second = (x.clone().requires_grad_() for _ in range(3))
    together, apart = run(both, both), run(first, second)
    assert_equal(together, apart)
    sum(t.square().sum() for t in together).backward()
    sum(t.square().sum() for t in apart).backward()
    assert torch.allclose(both.grad, first.grad + second.grad, rtol=1e-12)
    assert first.grad.data_ptr() != second.grad.data_ptr()


def test_the_gradients_of_two_leaves_do_not_share_memory():
    """The gradient of a plain residual is the same for x and f, but each owns its own."""
    x, f = (torch.randn(1, 3, D).requires_grad_() for _ in "xf")
    mv.residual_rmsnorm(x, f).sum().backward()
    before = f.grad.clone()
    x.grad.zero_()
    assert torch.equal(f.grad, before)


def expanded(t):
    return t[:1].expand_as(t) if t.dim() > 1 else t


def overlapping(t):
    """Return windows that overlap in memory, of the shape of t."""
    if t.dim() < 2:
        return t
    memory = torch.arange(float(t.numel()), dtype=t.dtype, device=t.device).cos()
    return memory.as_strided(t.shape, (*range(2, t.dim() + 1), 1))


def permuted(t):
    """Return t with its dimensions in memory in the opposite order."""
    order = list(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order)


def offset(t):
    """Return t at an address that is aligned to no vector."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return memory[1:].view(t.shape).copy_(t)


LAYOUTS = (expanded, overlapping, permuted, offset)


@EVERY_CALL
@ON_BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout_give_the_result_of_contiguous_ones(name, backend, layout):
    call, _, args = calls_of(name, backend, tiny=backend in ("triton", "cuda"))
    odd = [layout(t) for t in args]
    dense = [t.contiguous().clone().requires_grad_() for t in odd]
    expected = results_and_gradients(call, dense, dense)
    leaves = [t.detach().requires_grad_() for t in odd]
    assert [t.stride() for t in leaves] == [t.stride() for t in odd]
    assert_close(results_and_gradients(call, leaves, leaves), expected)


def scalar_expanded(t):
    return t.mean().expand_as(t)


@EVERY_CALL
@ON_BACKENDS
@pytest.mark.parametrize("layout", [scalar_expanded, expanded, overlapping, permuted, offset])
def test_cotangents_of_any_layout(name, backend, layout):
    call, _, args = calls_of(name, backend, tiny=backend in ("triton", "cuda"))
    leaves = [t.clone().requires_grad_() for t in args]
    odd = results_and_gradients(call, leaves, leaves, layout)
    dense = results_and_gradients(call, leaves, leaves, lambda t: layout(t).contiguous().clone())
    assert_close(odd, dense)


@EVERY_CALL
@ON_BACKENDS
def test_parameters_that_are_views(name, backend):
    """Columns of one matrix of parameters receive their gradient in it."""
    call, exact, args = calls_of(name, backend, tiny=True)
    vectors = [i for i, t in enumerate(args) if t.dim() == 1]
    if not vectors:
        return
    width = args[vectors[0]].numel()
    matrix = torch.stack([args[i] for i in vectors], 1).requires_grad_()
    columns = iter(matrix.unbind(1))
    results = call.results(*(next(columns) if i in vectors else t for i, t in enumerate(args)))
    (gradient,) = torch.autograd.grad(sum(t.square().sum() for t in results), matrix)
    leaves = [t.clone().requires_grad_() for t in args]
    expected = torch.autograd.grad(
        sum(t.square().sum() for t in exact.results(*leaves)), [leaves[i] for i in vectors]
    )
    assert gradient.shape == (width, len(vectors))
    assert_close(gradient.unbind(1), expected)


@EVERY_CALL
@ON_KERNELS
def test_a_change_of_a_saved_tensor_before_backward_is_refused(name, backend):
    """Each input and result: the gradient is right, or the version counter raises."""
    call, _, args = calls_of(name, backend, tiny=True)
    leaves = [t.clone().requires_grad_() for t in args]
    expected = results_and_gradients(call, leaves, leaves)[-len(args) :]
    refused = 0
    for changed in range(len(args) + 1):
        leaves = [t.clone().requires_grad_() for t in args]
        inputs = [t * 1 for t in leaves]
        results = call.results(*inputs)
        cotangents = [t.detach().cos() for t in results]
        with torch.no_grad():
            (inputs[changed] if changed < len(args) else results[0]).mul_(2)
        try:
            gradients = torch.autograd.grad(results, leaves, cotangents)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            refused += 1
        else:
            assert_close(gradients, expected)
    assert refused or name.startswith("rope")  # RoPE saves only its tables


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
def test_a_change_of_a_table_before_backward_is_refused(backend):
    angle = doubles((3, 2))
    cos, sin = angle.cos(), angle.sin()
    y = mv.rope(doubles((1, 3, 2, 4)).requires_grad_(), cos, sin)
    cos.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@EVERY_CALL
@ON_BACKENDS
def test_grad_mode_inside_and_outside(name, backend):
    call, _, args = calls_of(name, backend, tiny=True)
    leaves = [t.clone().requires_grad_() for t in args]
    expected = results_and_gradients(call, leaves, leaves)
    with torch.no_grad():
        assert not any(t.requires_grad for t in call.results(*leaves))
        with torch.enable_grad():
            results = call.results(*leaves)
        gradients = torch.autograd.grad(results, leaves, [t.detach().cos() for t in results])
    assert_close([*results, *gradients], expected)


@EVERY_CALL
@ON_BACKENDS
def test_results_do_not_share_memory_with_inputs_or_each_other(name, backend):
    call, _, args = calls_of(name, backend, tiny=True)
    before = [t.clone() for t in args]
    results = tree_leaves(call.run(*args))
    addresses = [t.untyped_storage().data_ptr() for t in (*args, *results)]
    assert len(set(addresses)) == len(addresses)
    for t in results:
        t.zero_()
    assert_equal(args, before)


@EVERY_CALL
@ON_BACKENDS
def test_no_samples_or_tokens(name, backend):
    call, _, args = calls_of(name, backend, tiny=True)
    empty = [t[:0] if t.dim() > 1 else t for t in args]
    if name == "rope, a table per sample" or name.startswith("rope_qk_norm"):
        return  # their tables have samples
    leaves = [t.clone().requires_grad_() for t in empty]
    results = results_and_gradients(call, leaves, leaves)
    assert all(t.numel() == 0 or not t.count_nonzero() for t in results)
