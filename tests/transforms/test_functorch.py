"""torch.func and forward-mode derivatives: right values, or an error that names the reference."""

import itertools
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import mvsplit_ops as mv
from tests.transforms.calls import CALLS, calls_of, doubles

BACKENDS = ("cpu", "triton", "cuda")
EVERY_CALL = pytest.mark.parametrize("name", CALLS)
ON_KERNELS = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
KERNELS_RAISE = pytest.raises(RuntimeError, match="backend='reference'")


def assert_close(results, expected):
    results, expected = tree_leaves(results), tree_leaves(expected)
    assert len(results) == len(expected)
    for a, b in zip(results, expected, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def scalar(call):
    """Return a function whose gradient depends on every differentiable result of a call."""

    def run(*args):
        return sum((t * t).sum() + (t * t.detach().cos()).sum() for t in call.results(*args))

    return run


@EVERY_CALL
@ON_KERNELS
def test_reverse_mode_transforms_equal_those_of_the_reference(name, backend):
    fused, exact, args = calls_of(name, backend)
    every = tuple(range(len(args)))
    assert_close(grad(scalar(fused), every)(*args), grad(scalar(exact), every)(*args))
    results, pull_back = vjp(fused.results, *args)
    expected, expected_pull_back = vjp(exact.results, *args)
    assert_close(results, expected)
    cotangents = tuple(torch.cos(t) for t in expected)
    assert_close(pull_back(cotangents), expected_pull_back(cotangents))


@EVERY_CALL
@ON_KERNELS
def test_jacrev_equals_that_of_the_reference(name, backend):
    fused, exact, args = calls_of(name, backend, tiny=True)
    every = tuple(range(len(args)))
    assert_close(jacrev(fused.results, every)(*args), jacrev(exact.results, every)(*args))


@EVERY_CALL
@ON_KERNELS
def test_vmap_and_per_sample_gradients_for_each_subset_of_inputs(name, backend):
    fused, exact, args = calls_of(name, backend, tiny=True)
    every = tuple(range(len(args)))
    batches = [torch.stack((t, 2 * t, t.cos())) for t in args]
    subsets = [s for s in itertools.product((0, None), repeat=len(args)) if any(d == 0 for d in s)]
    if backend != "cpu":
        subsets = [subsets[0], subsets[-1]]  # all inputs, and the last one
    for dims in subsets:
        mixed = [b if d == 0 else t for b, t, d in zip(batches, args, dims, strict=True)]
        assert_close(vmap(fused.results, dims)(*mixed), vmap(exact.results, dims)(*mixed))
        per_sample = vmap(grad(scalar(fused), every), dims)(*mixed)
        assert_close(per_sample, vmap(grad(scalar(exact), every), dims)(*mixed))


@EVERY_CALL
def test_vmap_over_any_dimension_and_twice(name):
    fused, exact, args = calls_of(name, "cpu", tiny=True)
    batches = [torch.stack((t, t + 1, 3 * t)) for t in args]
    last = [b.movedim(0, -1) for b in batches]
    assert_close(
        vmap(fused.results, in_dims=-1, out_dims=1)(*last),
        vmap(exact.results, in_dims=-1, out_dims=1)(*last),
    )
    pairs = [torch.stack((b, b - 1)) for b in batches]
    assert_close(vmap(vmap(fused.results))(*pairs), vmap(vmap(exact.results))(*pairs))


def test_a_batch_of_calls_is_one_call_of_a_kernel():
    x, f, a = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4, 8), torch.rand(8)
    with warnings.catch_warnings():  # functorch warns if it falls back to a loop
        warnings.simplefilter("error")
        with torch.profiler.profile() as profile:
            vmap(lambda x, f: mv.mvsplit_rmsnorm(x, f, a, a))(x, f)
    (event,) = (e for e in profile.key_averages() if e.key == "mvsplit::mvsplit_rmsnorm_fwd")
    assert event.count <= 2  # under vmap, and the kernel


def test_vmap_over_no_calls_names_the_remedy():
    w, q = torch.rand(0, 4), torch.rand(1, 1, 1, 4)
    with pytest.raises(ValueError, match="the batch must not be empty"):
        vmap(lambda w: mv.qk_norm(q, q, w))(w)


@EVERY_CALL
@ON_KERNELS
def test_no_tangent_is_dropped(name, backend):
    """jvp and dual tensors reach no kernel, whether or not an input requires grad."""
    fused, _, args = calls_of(name, backend, tiny=True)
    with KERNELS_RAISE:
        jvp(fused.results, tuple(args), tuple(args))
    with KERNELS_RAISE:
        jacfwd(fused.results)(*args)
    for i in range(len(args)):  # one dual tensor among frozen ones
        with forward_ad.dual_level():
            mixed = list(args)
            mixed[i] = forward_ad.make_dual(args[i], torch.ones_like(args[i]))
            with KERNELS_RAISE:
                fused.run(*mixed)
            with torch.no_grad(), KERNELS_RAISE:
                fused.run(*mixed)
    with forward_ad.dual_level():  # no tangent: nothing to lose
        fused.run(*args)


@EVERY_CALL
@ON_KERNELS
def test_no_second_derivative_is_dropped(name, backend):
    fused, exact, args = calls_of(name, backend, tiny=True)
    gradient = grad(scalar(fused))
    with KERNELS_RAISE:
        hessian(scalar(fused))(*args)
    with KERNELS_RAISE:
        grad(lambda *a: gradient(*a).square().sum())(*args)
    with KERNELS_RAISE:
        jvp(gradient, tuple(args), tuple(args))
    # A derivative by something else is right.
    weight = torch.rand_like(args[0])
    by_weight = grad(lambda w: (gradient(*args) * w).sum())(weight)
    assert_close(by_weight, grad(scalar(exact))(*args))


@EVERY_CALL
def test_the_reference_has_every_derivative(name):
    exact, _, args = calls_of(name, "reference", tiny=True)
    every = tuple(range(len(args)))
    jacobian = jacrev(exact.results, every)(*args)
    assert_close(jacfwd(exact.results, every)(*args), jacobian)
    _, tangents = jvp(exact.results, tuple(args), tuple(args))
    products = [
        sum((j * t).flatten(-t.dim()).sum(-1) for j, t in zip(row, args, strict=True))
        for row in jacobian
    ]
    assert_close(tangents, products)
    second = jacrev(jacrev(scalar(exact)))(*args)
    assert_close(hessian(scalar(exact))(*args), second)
    assert second.abs().max() > 0


@EVERY_CALL
def test_gradcheck_of_every_mode_of_the_reference(name):
    exact, _, args = calls_of(name, "reference", tiny=True)
    leaves = [t.requires_grad_() for t in args]
    assert torch.autograd.gradcheck(
        exact.results, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(exact.results, leaves, fast_mode=True)


@EVERY_CALL
@ON_KERNELS
def test_gradcheck_with_batched_gradients(name, backend):
    fused, _, args = calls_of(name, backend, tiny=True)
    leaves = [t.requires_grad_() for t in args]
    assert torch.autograd.gradcheck(fused.results, leaves, check_batched_grad=True, fast_mode=True)


def test_per_sample_gradients_of_a_module():
    merge = mv.MVSplitRMSNorm(8, init_alpha=0.2).double()
    parameters = {k: v.detach() for k, v in merge.named_parameters()}
    x, f = doubles((5, 3, 8)), doubles((5, 3, 8))

    def loss(parameters, x, f):
        y = functional_call(merge, parameters, (x[None], f[None]))
        return (y * y.detach().sin()).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, f)
    for i in range(5):
        assert_close({k: v[i] for k, v in per_sample.items()}, grad(loss)(parameters, x[i], f[i]))


def test_compiled_transforms_equal_eager():
    x, u = doubles((2, 3, 8)), doubles((2, 3, 8))
    gradient = grad(lambda x, u: mv.swiglu(x, u).square().sum())
    compiled = torch.compile(gradient, backend="aot_eager")
    assert_close(compiled(x, u), gradient(x, u))
