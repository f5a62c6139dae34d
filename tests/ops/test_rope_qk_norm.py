"""rope_qk_norm: the suite of every operator, and its own tests."""

import torch

import mvsplit_ops as mv
from bench.cases import heads, randn, rotary_tables
from tests.op_suite import OpSuite, assert_equal, call_and_list_saved, make, variant


def plain(shape, g):
    return heads(shape, g), rotary_tables(shape, g), {}


def scaled_tables(shape, g):
    """Tables like YaRN's, with cos^2 + sin^2 != 1: a rotation changes the norm of a row."""
    return heads(shape, g), [1.3 * t + 0.1 for t in rotary_tables(shape, g)], {}


def grouped(shape, g):
    q, k = heads(shape, g)
    return (q, k[:, :, :1].contiguous()), rotary_tables(shape, g), {}


def with_weights(shape, g):
    weights = tuple(randn(shape, g, shape.Dh, dtype=torch.float32) for _ in "qk")
    return (*heads(shape, g), *weights), rotary_tables(shape, g), {}


def tables_before_weights(op, activations, constants, kwargs):
    q, k, q_weight, k_weight = activations
    return op(q, k, *constants, q_weight, k_weight, **kwargs)


class TestRopeQKNorm(OpSuite):
    variants = {
        "plain": variant("rope_qk_norm", plain),
        "conjugate": variant("rope_qk_norm", plain, conjugate=True),
        "interleaved": variant("rope_qk_norm", plain, interleaved=True),
        "norm first": variant("rope_qk_norm", plain, norm_first=True),
        "grouped": variant("rope_qk_norm", grouped),
        "scaled tables": variant("rope_qk_norm", scaled_tables),
        "scaled tables, norm first": variant("rope_qk_norm", scaled_tables, norm_first=True),
    }

    def test_is_rope_then_qk_norm(self):
        (q, k), tables, _ = double_inputs()
        apart = mv.qk_norm(mv.rope(q, *tables), mv.rope(k, *tables))
        for a, b in zip(mv.rope_qk_norm(q, k, *tables), apart, strict=True):
            assert torch.allclose(a, b, rtol=1e-12)

    def test_without_weights_the_order_does_not_matter(self):
        (q, k), tables, _ = double_inputs()
        first = mv.rope_qk_norm(q, k, *tables, norm_first=True)
        for a, b in zip(mv.rope_qk_norm(q, k, *tables), first, strict=True):
            assert torch.allclose(a, b, rtol=1e-9)

    def test_saves_its_results_but_not_its_inputs(self):
        (q, k), tables, _ = make(self.variants["plain"])
        results, saved = call_and_list_saved(lambda q, k: mv.rope_qk_norm(q, k, *tables), q, k)
        assert saved == {t.data_ptr() for t in results}

    def test_packed_projection_is_not_copied(self):
        """q and k are halves of the output of one projection, so their rows have a stride."""
        packed, t = torch.randn(2, 9, 2, 3, 16, dtype=torch.bfloat16), torch.rand(9, 8)
        q, k = packed.unbind(2)
        assert_equal(mv.rope_qk_norm(q, k, t, t), mv.rope_qk_norm(q.clone(), k.clone(), t, t))

    def test_bad_input(self):
        q, t = torch.randn(2, 5, 3, 8), torch.rand(5, 4)
        with self.refuses("k must be (2, 5, heads, 8) to go with q, got (2, 5, 3, 6)"):
            mv.rope_qk_norm(q, q[..., :6], t, t)
        with self.refuses("cos must be at least 5 rows long"):
            mv.rope_qk_norm(q, q, t[:3], t[:3])
        with self.refuses("q_weight must be float32 (8,), got float32 (4,)"):
            mv.rope_qk_norm(q, q, t, t, torch.rand(4))
        with self.refuses("cos and sin must not require grad"):
            mv.rope_qk_norm(q, q, t.clone().requires_grad_(), t)


def double_inputs():
    (q, k), _, kwargs = make(TestRopeQKNorm.variants["plain"], dtype=torch.float64)
    angle = torch.rand(q.shape[1], q.shape[3] // 2, dtype=torch.float64)
    return (q, k), (angle.cos(), angle.sin()), kwargs


class TestRopeQKNormWeighted(OpSuite):
    variants = {
        name: variant("rope_qk_norm", with_weights, tables_before_weights, **kwargs)
        for name, kwargs in {
            "rotation first": {},
            "norm first": {"norm_first": True},
            "interleaved, norm first": {"interleaved": True, "norm_first": True, "conjugate": True},
        }.items()
    }
