"""The definitions, compared with their formulas written in another way."""

import math

import torch

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
