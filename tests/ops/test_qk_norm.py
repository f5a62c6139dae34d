import torch

import mvsplit_ops as mv
from bench.cases import heads, randn
from tests.op_suite import OpSuite, variant


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

    def test_one_weight_alone(self):
        q, k, w = (
            torch.randn(1, 2, 3, 8),
            torch.randn(1, 2, 3, 8),
            torch.rand(8, requires_grad=True),
        )
        for weights in ((w, None), (None, w)):
            got = mv.qk_norm(q, k, *weights)
            want = mv.qk_norm(q, k, *weights, backend="reference")
            for a, b in zip(got, want, strict=True):
                assert torch.allclose(a, b, atol=1e-6)
            sum(t.square().sum() for t in got).backward()
            assert w.grad.abs().sum() > 0
            w.grad = None

    def test_zero_weight_has_a_gradient(self):
        """y / weight would divide by zero: n must come from x."""
        q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
        w = torch.zeros(8, requires_grad=True)
        mv.qk_norm(q, k, w, w)[0].sum().backward()
        assert torch.isfinite(w.grad).all() and w.grad.abs().sum() > 0

    def test_keeps_its_results_not_its_inputs(self):
        q, k = (torch.randn(1, 2, 3, 8, requires_grad=True) for _ in "qk")
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            q_out, k_out = mv.qk_norm(q, k)
        big = {t.data_ptr() for t in saved if t.numel() == q.numel()}
        assert big == {q_out.data_ptr(), k_out.data_ptr()}

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
