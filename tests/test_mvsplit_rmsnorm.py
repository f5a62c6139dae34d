import pytest
import torch

import mvsplit_ops as mv
from bench.cases import randn
from op_suite import OpSuite, make, variant


def merge(shape, g, params=torch.float32):
    x, f = (randn(shape, g, shape.B, shape.T, shape.D) for _ in "xf")
    alpha = randn(shape, g, shape.D, dtype=params, mean=0.3)
    beta = randn(shape, g, shape.D, dtype=params, mean=0.8)
    return (x, f, alpha, beta), (), {"segments": list(shape.segments)}


def weighted(shape, g):
    activations, _, kwargs = merge(shape, g)
    return (*activations, randn(shape, g, shape.D, dtype=torch.float32)), (), kwargs


def narrow_parameters(shape, g):
    return merge(shape, g, shape.dtype)


def one_segment(shape, g):
    return merge(shape, g)[0], (), {}


def mean_dominated(shape, g):
    """The regime that the method is for: the token mean is larger than what varies around it."""
    (x, f, alpha, beta), _, kwargs = merge(shape, g)
    return (x + 4, f - 3, alpha, beta), (), kwargs


class TestMVSplitRMSNorm(OpSuite):
    variants = {
        "plain": variant("mvsplit_rmsnorm", merge),
        "weighted": variant("mvsplit_rmsnorm", weighted),
        "one segment": variant("mvsplit_rmsnorm", one_segment),
        "parameters in the dtype of x": variant("mvsplit_rmsnorm", narrow_parameters),
        "mean dominated": variant("mvsplit_rmsnorm", mean_dominated),
        "eps": variant("mvsplit_rmsnorm", merge, eps=0.1),
    }

    def test_gains_of_one_are_a_plain_residual(self):
        """alpha = beta = 1: x + P f + J f - J x; with J x removed beforehand that is x + f."""
        x, f = (
            torch.randn(2, 6, 16, dtype=torch.float64),
            torch.randn(2, 6, 16, dtype=torch.float64),
        )
        x -= x.mean(1, keepdim=True)
        one = torch.ones(16, dtype=torch.float64)
        assert torch.allclose(mv.mvsplit_rmsnorm(x, f, one, one), mv.residual_rmsnorm(x, f))

    def test_alpha_zero_passes_no_mean_of_the_branch(self):
        """alpha = 0: adding a constant to every token of f changes nothing."""
        x, f = (
            torch.randn(2, 6, 16, dtype=torch.float64),
            torch.randn(2, 6, 16, dtype=torch.float64),
        )
        zero, beta = torch.zeros(16, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
        shifted = mv.mvsplit_rmsnorm(x, f + 7, zero, beta)
        assert torch.allclose(mv.mvsplit_rmsnorm(x, f, zero, beta), shifted)

    def test_segments_and_samples_do_not_mix(self):
        activations, _, kwargs = make(self.variants["plain"], segments=(4, 3))
        y = mv.mvsplit_rmsnorm(*activations, **kwargs)
        changed = [t.clone() for t in activations]
        changed[0][:, :4] += 1
        assert torch.equal(mv.mvsplit_rmsnorm(*changed, **kwargs)[:, 4:], y[:, 4:])
        alone = [t[1:] if t.dim() == 3 else t for t in activations]
        assert torch.equal(mv.mvsplit_rmsnorm(*alone, **kwargs), y[1:])

    def test_many_samples_are_the_same_as_each_alone(self, backend, threads):
        """More bytes than the cores' caches, more tokens than a program's share."""
        threads(1)
        shape = {"segments": (300, 40), "D": 1024} if backend == "cpu" else {"segments": (33, 4)}
        activations, _, kwargs = make(self.variants["plain"], B=6, **shape)
        y = mv.mvsplit_rmsnorm(*activations, **kwargs)
        for b in range(6):
            one = [t[b : b + 1] if t.dim() == 3 else t for t in activations]
            assert torch.equal(mv.mvsplit_rmsnorm(*one, **kwargs), y[b : b + 1])

    def test_keeps_y_and_f_not_x(self):
        (x, f, alpha, beta), _, kwargs = make(self.variants["plain"])
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = mv.mvsplit_rmsnorm(x.requires_grad_(), f.requires_grad_(), alpha, beta, **kwargs)
        assert {t.data_ptr() for t in saved if t.numel() == x.numel()} == {
            y.data_ptr(),
            f.data_ptr(),
        }

    @pytest.mark.parametrize("segments", [(3, 3), (5, 3), (7, 0), (8, -1), ()], ids=str)
    def test_bad_segments(self, segments):
        x, a = torch.randn(2, 7, 8), torch.rand(8)
        with self.refuses("segments must be token counts"):
            mv.mvsplit_rmsnorm(x, x, a, a, segments=segments)

    @pytest.mark.parametrize("segments", [7, (3.5, 3.5), "34", torch.tensor([3, 4])], ids=str)
    def test_segments_of_another_type(self, segments):
        x, a = torch.randn(2, 7, 8), torch.rand(8)
        with self.refuses("segments must be a sequence of token counts"):
            mv.mvsplit_rmsnorm(x, x, a, a, segments=segments)

    def test_bad_input(self):
        x, a = torch.randn(2, 7, 8), torch.rand(8)
        with self.refuses("f must be of the shape of x, (2, 7, 8), got (1, 7, 8)"):
            mv.mvsplit_rmsnorm(x, x[:1], a, a)
        with self.refuses("f must be float32 like x, got bfloat16 (2, 7, 8)"):
            mv.mvsplit_rmsnorm(x, x.bfloat16(), a, a)
        with self.refuses("x must be a tensor (B, T, D)"):
            mv.mvsplit_rmsnorm(x[0], x[0], a, a, segments=(7,))
        with self.refuses("alpha must be float32 (8,), got float32 (1,)"):
            mv.mvsplit_rmsnorm(x, x, a[:1], a)
        with self.refuses("beta must be float32 (8,), got bfloat16 (8,)"):
            mv.mvsplit_rmsnorm(x, x, a, a.bfloat16())
        with self.refuses("weight must be float32 (8,), got float32 (8, 1)"):
            mv.mvsplit_rmsnorm(x, x, a, a, a[:, None])
        with self.refuses(f"alpha must be on {x.device}"):
            mv.mvsplit_rmsnorm(x, x, a.to("meta"), a)
        with self.refuses(f"f must be on {x.device}"):
            mv.mvsplit_rmsnorm(x, x.to("meta"), a, a)
        with self.refuses("D, the last dimension of x, must be at least 1, got 0"):
            mv.mvsplit_rmsnorm(x[..., :0], x[..., :0], a[:0], a[:0])
        with self.refuses("segments must be token counts of at least 1, got (0,)"):
            mv.mvsplit_rmsnorm(x[:, :0], x[:, :0], a, a)
