"""rope: the suite of every operator, and its own tests."""

import math

import pytest
import torch

import mvsplit_ops as mv
from bench.cases import heads, rotary_tables
from tests.op_suite import OpSuite, variant


def one_head_set(shape, g):
    return heads(shape, g)[:1], rotary_tables(shape, g), {}


def a_table_for_each_sample(shape, g):
    (x,), (cos, sin), _ = one_head_set(shape, g)
    turns = torch.arange(1, shape.B + 1, dtype=cos.dtype, device=cos.device).view(-1, 1, 1)
    return (x,), (cos * turns, sin / turns), {}


TABLES = "(5, 2), (1, 5, 2) or (2, 5, 2), or of width 4, of float32, bfloat16, float16, float64"


class TestRope(OpSuite):
    variants = {
        "halves": variant("rope", one_head_set),
        "conjugate": variant("rope", one_head_set, conjugate=True),
        "interleaved": variant("rope", one_head_set, interleaved=True),
        "interleaved conjugate": variant("rope", one_head_set, interleaved=True, conjugate=True),
        "a table for each sample": variant("rope", a_table_for_each_sample),
    }

    def test_rotates_by_the_angle(self):
        """A pair at angle a becomes the pair at angle a + theta."""
        a, theta = 0.3, 0.5
        x = torch.tensor([math.cos(a), math.sin(a)], dtype=torch.float64).view(1, 1, 1, 2)
        cos, sin = (torch.tensor([[f(theta)]], dtype=torch.float64) for f in (math.cos, math.sin))
        want = torch.tensor([math.cos(a + theta), math.sin(a + theta)], dtype=torch.float64)
        assert torch.allclose(mv.rope(x, cos, sin).flatten(), want)
        back = mv.rope(mv.rope(x, cos, sin), cos, sin, conjugate=True)
        assert torch.allclose(back, x)

    def test_rows_of_a_table_after_the_last_token_are_ignored(self):
        x, angle = torch.randn(2, 5, 1, 4), torch.rand(9, 2)
        whole = mv.rope(x, angle.cos(), angle.sin())
        assert torch.equal(whole, mv.rope(x, angle[:5].cos(), angle[:5].sin()))

    def test_strides_of_tokens_may_exceed_32_bits(self):
        memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # 4 GiB; two rows are used
        far, angle = memory.as_strided((1, 2, 2, 32), (0, 2**31, 32, 1)), torch.rand(2, 16)
        far.copy_(torch.randn(1, 2, 2, 32))
        want = mv.rope(far.contiguous(), angle.cos(), angle.sin())
        assert torch.equal(mv.rope(far, angle.cos(), angle.sin()), want)

    def test_bad_input(self):
        x, t = torch.randn(2, 5, 1, 4), torch.rand(5, 2)
        with self.refuses("x must be a tensor (B, T, H, Dh)"):
            mv.rope(x[0], t, t)
        with self.refuses(
            "x must be a tensor (B, T, H, Dh) of float32, bfloat16, float16, float64"
        ):
            mv.rope(x.long(), t, t)
        with self.refuses("Dh, the last dimension of x, must be even, got 3"):
            mv.rope(x[..., :3], t, t)
        with self.refuses(
            "cos must be at least 5 rows long, one for each token, got float32 (4, 2)"
        ):
            mv.rope(x, t[:4], t[:4])
        with self.refuses(f"cos must be {TABLES}, got float32 (5, 3)"):
            mv.rope(x, torch.rand(5, 3), torch.rand(5, 3))
        with self.refuses(f"cos must be {TABLES}, got float32 (3, 5, 2)"):
            mv.rope(x, t.expand(3, 5, 2), t.expand(3, 5, 2))
        with self.refuses(f"cos must be {TABLES}, got int64 (5, 2)"):
            mv.rope(x, t.long(), t.long())
        with self.refuses("sin must be of the shape of cos, (6, 2), got (5, 2)"):
            mv.rope(x, torch.rand(6, 2), t)
        with self.refuses(f"cos must be on {x.device}, the device of the first input, got meta"):
            mv.rope(x, t.to("meta"), t.to("meta"))
        with self.refuses("the first argument must be a tensor, got list"):
            mv.rope([1.0], t, t)

    @pytest.mark.parametrize("index", [0, 1])
    def test_a_table_that_requires_grad_is_refused(self, index):
        tables = [torch.rand(5, 2).requires_grad_(i == index) for i in (0, 1)]
        x = torch.randn(2, 5, 1, 4)
        with self.refuses("cos and sin must not require grad"):
            mv.rope(x, *tables)
        mv.rope(x, *tables, backend="reference").sum().backward()
        assert tables[index].grad is not None
