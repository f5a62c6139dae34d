"""The definitions, compared with their formulas written in another way."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mvsplit_ops import reference


def doubles(*shapes):
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


def test_token_mean_is_a_projection_on_segment_means():
    (t,) = doubles((2, 7, 3))
    j = reference.token_mean(t, [4, 1, 2])
    assert torch.allclose(j[:, :4], t[:, :4].mean(1, keepdim=True).expand(2, 4, 3))
    assert torch.allclose(j[:, 4], t[:, 4])
    assert torch.allclose(reference.token_mean(j, [4, 1, 2]), j)


def test_mvsplit_is_its_formula_token_by_token():
    x, f, alpha, beta = doubles((2, 5, 4), (2, 5, 4), 4, 4)
    y = reference.mvsplit_rmsnorm(x, f, alpha, beta, segments=[3, 2], eps=0.1)
    for b in range(2):
        for begin, end in ((0, 3), (3, 5)):
            jx, jf = x[b, begin:end].mean(0), f[b, begin:end].mean(0)
            for t in range(begin, end):
                z = x[b, t] + beta * (f[b, t] - jf) + alpha * (jf - jx)
                want = z / math.sqrt(sum(v * v for v in z.tolist()) / 4 + 0.1)
                assert torch.allclose(y[b, t], want)


def test_rope_is_a_complex_rotation():
    x, angle = doubles((2, 3, 2, 8), (3, 4))
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    for interleaved in (False, True):
        for conjugate in (False, True):
            got = reference.rope(x, angle.cos(), angle.sin(), interleaved, conjugate)
            pairs = x.view(2, 3, 2, 4, 2) if interleaved else x.view(2, 3, 2, 2, 4).mT
            want = torch.view_as_complex(pairs.contiguous()) * (turn.conj() if conjugate else turn)
            parts = (want.real, want.imag)
            want = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
            assert torch.allclose(got, want)


def test_rms_norm_has_unit_mean_square():
    (x,) = doubles((4, 6))
    mean_square = reference.rms_norm(x, None, 0.0).square().mean(-1)
    assert torch.allclose(mean_square, torch.ones(4).double())
    weight = torch.arange(6.0, dtype=torch.float64)
    expected = torch.nn.functional.rms_norm(x, (6,), weight, 1e-5)
    assert torch.allclose(reference.rms_norm(x, weight, 1e-5), expected)


def test_results_have_the_dtype_of_the_activations():
    x, f = (torch.randn(1, 4, 8, dtype=torch.bfloat16) for _ in "xf")
    q, t, w = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16), torch.rand(4, 4), torch.rand(8)
    results = (
        reference.rope(q, t, t),
        *reference.qk_norm(q, q, w, w),
        *reference.rope_qk_norm(q, q, t, t, w, w, norm_first=True),
        reference.swiglu(x),
        reference.mvsplit_rmsnorm(x, f, w, w, w, segments=(3, 1)),
        reference.residual_rmsnorm(x, f, w, w),
    )
    assert {t.dtype for t in results} == {torch.bfloat16}


def calls(dtype):
    """Return (definition, activations, other arguments) of every operator."""
    q, k = (torch.randn(2, 6, 3, 8, dtype=dtype) for _ in "qk")
    x, f = (torch.randn(2, 6, 8, dtype=dtype) for _ in "xf")
    angle, w = torch.rand(6, 4), torch.rand(8)
    tables, segments = (angle.cos(), angle.sin()), [4, 2]
    return (
        (reference.rms_norm, (x,), (w, 1e-5)),
        (reference.rope, (q,), tables),
        (reference.qk_norm, (q, k), (w, None)),
        (reference.rope_qk_norm, (q, k), (*tables, None, w)),
        (reference.rope_qk_norm, (q, k), (*tables, w, w, 1e-6, True, False, True)),
        (reference.swiglu, (x,), ()),
        (reference.swiglu, (x, f), ()),
        (reference.mvsplit_rmsnorm, (x, f), (w, w, None, segments)),
        (reference.residual_rmsnorm, (x, f), (w, w)),
    )


def results_and_gradients(definition, activations, others):
    leaves = [t.detach().requires_grad_() for t in activations]
    results = definition(*leaves, *others)
    results = (results,) if isinstance(results, torch.Tensor) else results
    return *results, *torch.autograd.grad(results, leaves, [t.detach() for t in results])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_are_computed_in_float32_and_rounded_once(dtype):
    for definition, activations, others in calls(dtype):
        results = results_and_gradients(definition, activations, others)
        wide = [t.float().requires_grad_() for t in activations]
        outputs = definition(*wide, *others)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        rounded = [t.detach().to(dtype) for t in outputs]
        grads = torch.autograd.grad(outputs, wide, [t.float() for t in rounded])
        for got, want in zip(results, (*rounded, *grads), strict=True):
            assert got.dtype == dtype and torch.equal(got, want.to(dtype))


def test_parameters_and_tables_of_any_dtype_have_gradients_of_their_own():
    q, w = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16), torch.rand(8, dtype=torch.float16)
    cos, sin = (torch.rand(1, 9, 4, dtype=torch.float64) for _ in range(2))
    leaves = [t.requires_grad_() for t in (q, cos, sin, w)]
    results = reference.rope_qk_norm(q, q, cos, sin, w)
    grads = torch.autograd.grad(sum(t.float().sum() for t in results), leaves)
    assert [t.dtype for t in grads] == [t.dtype for t in leaves]
    assert all(t.isfinite().all() for t in grads)


def test_the_first_argument_may_be_a_keyword():
    q, k = (torch.randn(1, 4, 2, 8, dtype=torch.bfloat16) for _ in "qk")
    for got, want in zip(reference.qk_norm(k=k, q=q), reference.qk_norm(q, k), strict=True):
        assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def test_swiglu_takes_two_tensors_or_either_order_of_halves():
    gate, up = doubles((3, 5), (3, 5))
    want = gate * torch.sigmoid(gate) * up
    for got in (
        reference.swiglu(gate, up),
        reference.swiglu(torch.cat((gate, up), -1)),
        reference.swiglu(torch.cat((up, gate), -1), gate_first=False),
    ):
        assert torch.allclose(got, want)


def test_transforms_and_tracers_go_through_the_definitions():
    for definition, activations, others in calls(torch.bfloat16):

        def call(*tensors, definition=definition, others=others):
            return definition(*tensors, *others)

        want = call(*activations)
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        for got in (compiled(*activations), make_fx(call)(*activations)(*activations)):
            assert_equal(got, want)
        _, tangents = torch.func.jvp(call, activations, activations)
        step = 2.0**-10
        wide = [t.double() for t in activations]
        ends = (call(*(t * (1 + s) for t in wide)) for s in (step, -step))
        for tangent, ahead, behind in zip(*map(as_tuple, (tangents, *ends)), strict=True):
            slope = (ahead - behind) / (2 * step)
            assert torch.allclose(tangent.double(), slope, rtol=0.02, atol=0.02)
        batched = torch.vmap(call)(*(torch.stack((t, t)) for t in activations))
        assert_equal(tuple(t[1] for t in as_tuple(batched)), want)


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def assert_equal(results, expected):
    for got, want in zip(as_tuple(results), as_tuple(expected), strict=True):
        assert torch.equal(got, want)
