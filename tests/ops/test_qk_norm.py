"""qk_norm: the suite of every operator, and its own tests."""

import torch

import mvsplit_ops as mv
from bench.cases import heads, randn
from tests.op_suite import OpSuite, call_and_list_saved, variant


def plain(shape, g):
    return heads(shape, g), (), {}


def weighted(shape, g):
    weights = tuple(randn(shape, g, shape.Dh, dtype=torch.float32) for _ in "qk")
    return (*heads(shape, g), *weights), (), {}


def grouped(shape, g):
    q, k = heads(shape, g)
    return (q, k[:, :, :1].contiguous()), (), {}


def narrow_weights(shape, g):
    q, k, q_weight, k_weight = weighted(shape, g)[0]
    return (q, k, q_weight.to(q.dtype), k_weight.to(q.dtype)), (), {}


class TestQKNorm(OpSuite):
    variants = {
        "plain": variant("qk_norm", plain),
        "weighted": variant("qk_norm", weighted),
        "grouped": variant("qk_norm", grouped),
        "weights in the dtype of q": variant("qk_norm", narrow_weights),
        "eps": variant("qk_norm", plain, eps=0.5),
    }

    def test_a_weight_of_q_or_of_k_only(self):
        q, k, w = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), torch.rand(8).requires_grad_()
        for weights in ((w, None), (None, w)):
            got = mv.qk_norm(q, k, *weights)
            want = mv.qk_norm(q, k, *weights, backend="reference")
            for a, b in zip(got, want, strict=True):
                assert torch.allclose(a, b, atol=1e-6)
            sum(t.square().sum() for t in got).backward()
            assert w.grad.abs().sum() > 0
            w.grad = None

    def test_zero_weight_has_a_gradient(self):
        """y / weight would divide by zero, so n must be computed from x."""
        q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
        w = torch.zeros(8, requires_grad=True)
        mv.qk_norm(q, k, w, w)[0].sum().backward()
        assert torch.isfinite(w.grad).all() and w.grad.abs().sum() > 0

    def test_saves_its_results_but_not_its_inputs(self):
        results, saved = call_and_list_saved(mv.qk_norm, *torch.randn(2, 1, 2, 3, 8))
        assert saved == {t.data_ptr() for t in results}

    def test_bad_input(self):
        q = torch.randn(2, 5, 3, 8)
        with self.refuses("k must be (2, 5, heads, 8) to go with q, got (2, 4, 3, 8)"):
            mv.qk_norm(q, q[:, :4])
        with self.refuses("k must be (2, 5, heads, 8) to go with q, got (1, 5, 3, 8)"):
            mv.qk_norm(q, q[:1])
        with self.refuses("k must be float32 like q, got bfloat16"):
            mv.qk_norm(q, q.bfloat16())
        with self.refuses("q_weight must be float32 (8,), got float32 (3, 8)"):
            mv.qk_norm(q, q, torch.rand(3, 8))
        with self.refuses("k_weight must be float32 or bfloat16 (8,), got float64 (8,)"):
            mv.qk_norm(q.bfloat16(), q.bfloat16(), None, torch.rand(8).double())
        with self.refuses("q must be a tensor (B, T, H, Dh)"):
            mv.qk_norm(q[0], q[0])
