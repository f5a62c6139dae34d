"""swiglu: the suite of every operator, and its own tests."""

import torch

import mvsplit_ops as mv
from bench.cases import randn
from tests.op_suite import OpSuite, variant


def packed(shape, g):
    return (randn(shape, g, shape.B, shape.T, 2 * shape.F),), (), {}


def one_token_row(shape, g):
    return (randn(shape, g, shape.B, 2 * shape.F),), (), {}


def four_dimensions(shape, g):
    return (randn(shape, g, shape.B, 2, shape.T, 2 * shape.F),), (), {}


def large(shape, g):
    return (randn(shape, g, shape.B, shape.T, 2 * shape.F, std=30.0),), (), {}


def two_tensors(shape, g):
    return tuple(randn(shape, g, shape.B, shape.T, shape.F) for _ in ("gate", "up")), (), {}


class TestSwiglu(OpSuite):
    variants = {
        "packed": variant("swiglu", packed),
        "value first": variant("swiglu", packed, gate_first=False),
        "two tensors": variant("swiglu", two_tensors),
        "(B, 2F)": variant("swiglu", one_token_row),
        "(B, 2, T, 2F)": variant("swiglu", four_dimensions),
        "large values": variant("swiglu", large),
    }

    def test_gate_is_first(self):
        x = torch.tensor([1.0, 2.0, 3.0, 5.0])
        want = torch.nn.functional.silu(x[:2]) * x[2:]
        assert torch.allclose(mv.swiglu(x), want)

    def test_every_form_is_the_same_function(self):
        """Views of one projection, in either order, and separate tensors; nothing is copied."""
        wide = torch.randn(2, 3, 40)
        gate, up = wide[..., 4:14], wide[..., 20:30]
        want = torch.nn.functional.silu(gate.double()) * up.double()
        dy = torch.randn(2, 3, 10)
        for form, options in (
            (lambda g, u: (torch.cat((g, u), -1),), {}),
            (lambda g, u: (torch.cat((u, g), -1),), {"gate_first": False}),
            (lambda g, u: (g, u), {}),
            (lambda g, u: (g, u.contiguous()), {"gate_first": True}),
            (lambda g, u: (g.mT.contiguous().mT, u.flip(0)[[1, 0]]), {}),
        ):
            leaf = wide.clone().requires_grad_()
            y = mv.swiglu(*form(leaf[..., 4:14], leaf[..., 20:30]), **options)
            assert y.is_contiguous() and torch.allclose(y.double(), want, rtol=1e-5, atol=1e-6)
            (gradient,) = torch.autograd.grad(y, leaf, dy)
            exact = wide.double().requires_grad_()
            product = torch.nn.functional.silu(exact[..., 4:14]) * exact[..., 20:30]
            (wanted,) = torch.autograd.grad(product, exact, dy.double())
            assert torch.allclose(gradient.double(), wanted, rtol=1e-4, atol=1e-6)

    def test_saturated_gates(self, capability):
        """For large arguments sigmoid is exactly 0 or 1, and nothing overflows."""
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            gate = torch.tensor([-1e4, -300.0, -90.0, 0.0, 90.0, 300.0, 1e4], dtype=dtype)
            x = torch.cat((gate, torch.ones_like(gate))).requires_grad_()
            y = mv.swiglu(x)
            y.sum().backward()
            assert torch.allclose(y, gate.clamp(min=0), atol=1e-30)
            assert torch.isfinite(x.grad).all()

    def test_strides_of_rows_may_exceed_32_bits(self):
        memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # 4 GiB; two rows are used
        far = memory.as_strided((2, 64), (2**31, 1))
        far.copy_(torch.randn(2, 64))
        assert torch.equal(mv.swiglu(far), mv.swiglu(far.contiguous()))

    def test_bad_input(self):
        with self.refuses("2F, the last dimension of x, must be even, got 5"):
            mv.swiglu(torch.randn(3, 5))
        with self.refuses("x must be a floating-point tensor (.., 2F), got int64 (4,)"):
            mv.swiglu(torch.arange(4))
        with self.refuses("x must be a floating-point tensor (.., 2F), got float32 ()"):
            mv.swiglu(torch.tensor(1.0))
        with self.refuses("the first argument must be a tensor, got NoneType"):
            mv.swiglu(None)
        x = torch.randn(3, 4)
        with self.refuses("up must be of the shape of x, (3, 4), got (3, 2)"):
            mv.swiglu(x, x[:, :2])
        with self.refuses("up must be of the shape of x, (3, 4), got (4,)"):
            mv.swiglu(x, x[0])
        with self.refuses("up must be float32 like x, got bfloat16 (3, 4)"):
            mv.swiglu(x, x.bfloat16())
        with self.refuses(f"up must be on {x.device}, the device of the first input, got meta"):
            mv.swiglu(x, x.to("meta"))
        with self.refuses("gate_first must be True if up is passed: x is the gate, got False"):
            mv.swiglu(x, x, gate_first=False)
