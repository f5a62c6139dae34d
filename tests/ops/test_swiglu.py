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


class TestSwiglu(OpSuite):
    variants = {
        "packed": variant("swiglu", packed),
        "(B, 2F)": variant("swiglu", one_token_row),
        "(B, 2, T, 2F)": variant("swiglu", four_dimensions),
        "large values": variant("swiglu", large),
    }

    def test_gate_is_first(self):
        x = torch.tensor([1.0, 2.0, 3.0, 5.0])
        want = torch.nn.functional.silu(x[:2]) * x[2:]
        assert torch.allclose(mv.swiglu(x), want)

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
