"""residual_rmsnorm: the suite of every operator, and its own tests."""

import torch

import mvsplit_ops as mv
from bench.cases import randn
from tests.op_suite import OpSuite, call_and_list_saved, variant


def pair(shape, g):
    return tuple(randn(shape, g, shape.B, shape.T, shape.D) for _ in "xf")


def post_norm(shape, g):
    return pair(shape, g), (), {}


def layerscale(shape, g):
    return (*pair(shape, g), randn(shape, g, shape.D, dtype=torch.float32)), (), {}


def weighted(shape, g):
    scale, weight = (randn(shape, g, shape.D, dtype=torch.float32) for _ in range(2))
    return (*pair(shape, g), scale, weight), (), {}


def without_scale(op, activations, constants, kwargs):
    x, f, weight = activations
    return op(x, f, None, weight, **kwargs)


class TestResidualRMSNorm(OpSuite):
    variants = {
        "Post-Norm": variant("residual_rmsnorm", post_norm),
        "LayerScale": variant("residual_rmsnorm", layerscale),
        "weighted": variant("residual_rmsnorm", weighted),
        "weight only": variant("residual_rmsnorm", layerscale, without_scale),
        "eps": variant("residual_rmsnorm", post_norm, eps=0.1),
    }

    def test_rezero_is_layerscale_with_one_number(self):
        """The gradient of a scalar scale is the sum of LayerScale's."""
        x, f = (torch.randn(2, 5, 16, dtype=torch.bfloat16) for _ in "xf")
        scalar = torch.tensor(0.7, requires_grad=True)
        vector = torch.full((16,), 0.7, requires_grad=True)
        y = mv.residual_rmsnorm(x, f, scalar)
        assert torch.equal(y, mv.residual_rmsnorm(x, f, vector))
        y.sum().backward()
        mv.residual_rmsnorm(x, f, vector).sum().backward()
        assert torch.equal(scalar.grad, vector.grad.sum())
        doubles = [
            t.double().requires_grad_() for t in (x[:, :2, :6], f[:, :2, :6], scalar.detach())
        ]
        assert torch.autograd.gradcheck(mv.residual_rmsnorm, doubles)

    def test_post_norm_saves_only_y(self):
        y, saved = call_and_list_saved(mv.residual_rmsnorm, *torch.randn(2, 2, 3, 8))
        assert saved == {y.data_ptr()}

    def test_bad_input(self):
        x, s = torch.randn(2, 7, 8), torch.rand(8)
        with self.refuses("f must be of the shape of x, (2, 7, 8), got (2, 1, 8)"):
            mv.residual_rmsnorm(x, x[:, :1])
        with self.refuses("scale must be float32 (8,), got float32 (4,)"):
            mv.residual_rmsnorm(x, x, s[:4])
        with self.refuses("weight must be float32 (8,), got float64 (8,)"):
            mv.residual_rmsnorm(x, x, s, s.double())
        with self.refuses("scale must be float32 (8,), got float32 (1,)"):
            mv.residual_rmsnorm(x, x, s[:1])
        with self.refuses("x must be a tensor (B, T, D)"):
            mv.residual_rmsnorm(x[0], x[0], torch.tensor(1.0))
        with self.refuses("the first argument must be a tensor, got float"):
            mv.residual_rmsnorm(1.0, x, torch.tensor(1.0))
        with self.refuses("x must be a tensor (B, T, D)"):
            mv.residual_rmsnorm(torch.tensor(1.0), x, torch.tensor(1.0))
