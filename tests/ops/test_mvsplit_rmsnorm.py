"""mvsplit_rmsnorm: the suite of every operator, and its own tests."""

import pytest
import torch
from torch.library import opcheck

import mvsplit_ops as mv
from bench.cases import randn
from bench.common.accuracy import double
from tests.op_suite import OpSuite, all_tensors, assert_equal, call_and_list_saved, make, variant


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
    """Inputs with a token mean larger than the variation around it, which the method is for."""
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
        """alpha = beta = 1 gives x + P f + J f - J x, which is x + f if J x is zero."""
        x, f = (torch.randn(2, 6, 16, dtype=torch.float64) for _ in "xf")
        x -= x.mean(1, keepdim=True)
        one = torch.ones(16, dtype=torch.float64)
        assert torch.allclose(mv.mvsplit_rmsnorm(x, f, one, one), mv.residual_rmsnorm(x, f))

    def test_alpha_zero_ignores_the_mean_of_the_branch(self):
        """With alpha = 0, adding a constant to every token of f changes nothing."""
        x, f = (torch.randn(2, 6, 16, dtype=torch.float64) for _ in "xf")
        zero, beta = torch.zeros(16, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
        shifted = mv.mvsplit_rmsnorm(x, f + 7, zero, beta)
        assert torch.allclose(mv.mvsplit_rmsnorm(x, f, zero, beta), shifted)

    def test_segments_and_samples_do_not_mix(self):
        activations, _, kwargs = make(self.variants["plain"], segments=(4, 3))
        y = mv.mvsplit_rmsnorm(*activations, **kwargs)
        changed = [t.clone() for t in activations]
        changed[0][:, :4] += 1
        assert torch.equal(mv.mvsplit_rmsnorm(*changed, **kwargs)[:, 4:], y[:, 4:])
        second = [t[1:] if t.dim() == 3 else t for t in activations]
        assert torch.equal(mv.mvsplit_rmsnorm(*second, **kwargs), y[1:])

    def test_a_sample_does_not_depend_on_the_batch(self, backend, threads):
        """With more bytes than the caches hold, and more tokens than one program processes."""
        threads(1)
        shape = {"segments": (300, 40), "D": 1024} if backend == "cpu" else {"segments": (33, 4)}
        activations, _, kwargs = make(self.variants["plain"], B=6, **shape)
        y = mv.mvsplit_rmsnorm(*activations, **kwargs)
        for b in range(6):
            one = [t[b : b + 1] if t.dim() == 3 else t for t in activations]
            assert torch.equal(mv.mvsplit_rmsnorm(*one, **kwargs), y[b : b + 1])

    def test_saves_y_and_f_but_not_x(self):
        (x, f, alpha, beta), _, kwargs = make(self.variants["plain"])
        y, saved = call_and_list_saved(
            lambda x, f: mv.mvsplit_rmsnorm(x, f, alpha, beta, **kwargs), x, f
        )
        assert saved == {y.data_ptr(), f.data_ptr()}

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("plain", torch.bfloat16),
            ("weighted", torch.float32),
            ("one segment", torch.float64),
        ],
        ids=str,
    )
    def test_the_mean_that_a_chain_carries(self, name, dtype):
        """jy is the mean of y as it is stored; the next merge gives the same result with it."""
        shape = {"segments": (37, 5, 1), "D": 96, "dtype": dtype}
        activations, _, kwargs = make(self.variants[name], **shape)
        if dtype == torch.float64:
            activations = [t.double() for t in activations]
        y, jy = mv.mvsplit_rmsnorm_with_mean(*activations, **kwargs)
        assert torch.equal(y, mv.mvsplit_rmsnorm(*activations, **kwargs))
        segments = kwargs.get("segments", [43])
        exact = mv.reference.segment_means(y.double(), segments)
        assert jy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.allclose(jy.double(), exact, rtol=0, atol=1e-6)
        x, *rest = activations
        jx = mv.reference.segment_means(x, segments)
        inputs = activations, (), kwargs
        plain = all_tensors(lambda a, c, k: [mv.mvsplit_rmsnorm(*a, **k)], inputs)
        chained = all_tensors(
            lambda a, c, k: [mv.mvsplit_rmsnorm_with_mean(*a, jx=jx, **k)[0]], inputs
        )
        for got, want in zip(chained, plain, strict=True):
            atol = 2 * torch.finfo(dtype).eps * want.abs().max().item()
            assert torch.allclose(got, want, rtol=1e-4, atol=atol)

    def test_an_input_mean_is_used_instead_of_computed(self):
        """With alpha = 1 and f = 0 the merge is RMSNorm(x - jx), which shows which jx it used."""
        x, one = torch.randn(2, 6, 16), torch.ones(16)
        f, jx = torch.zeros_like(x), torch.randn(2, 2, 16)
        y, _ = mv.mvsplit_rmsnorm_with_mean(x, f, one, one, jx=jx, segments=(4, 2))
        z = x - torch.cat((jx[:, :1].expand(2, 4, 16), jx[:, 1:].expand(2, 2, 16)), 1)
        assert torch.allclose(y, mv.reference.rms_norm(z, None, 1e-5), atol=1e-5)

    def test_the_carried_mean_has_no_gradient(self):
        x, f = (torch.randn(2, 6, 16, requires_grad=True) for _ in "xf")
        a, jx = torch.rand(16), torch.randn(2, 1, 16, requires_grad=True)
        for backend in (None, "reference"):
            y, jy = mv.mvsplit_rmsnorm_with_mean(x, f, a, a, jx=jx, backend=backend)
            assert y.requires_grad and not jy.requires_grad
            y.sum().backward()
            assert jx.grad is None

    def test_opcheck_with_mean(self):
        (x, f, alpha, beta), _, kwargs = make(self.variants["plain"], dtype=torch.float32)
        x.requires_grad_()
        jx = mv.reference.segment_means(x.detach(), kwargs["segments"])
        op = torch.ops.mvsplit.mvsplit_rmsnorm_with_mean.default
        for hint in (None, jx):
            opcheck(op, (x, f, alpha, beta), {**kwargs, "jx": hint})

    def test_a_compiled_chain_equals_an_eager_one(self):
        def chain(x, f, alpha, beta, segments):
            y, jy = mv.mvsplit_rmsnorm_with_mean(x, f, alpha, beta, segments=segments)
            return mv.mvsplit_rmsnorm_with_mean(y, f, beta, alpha, jx=jy, segments=segments)

        activations, _, kwargs = make(self.variants["plain"])
        torch.compiler.reset()
        compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
        assert_equal(compiled(*activations, **kwargs), chain(*activations, **kwargs))

    def test_bad_mean(self):
        x, a = torch.randn(2, 7, 8, dtype=torch.bfloat16), torch.rand(8)
        with self.refuses("jx must be float32 (2, 2, 8), got float32 (2, 1, 8)"):
            mv.mvsplit_rmsnorm_with_mean(x, x, a, a, jx=torch.zeros(2, 1, 8), segments=(4, 3))
        with self.refuses("jx must be float32 (2, 1, 8), got bfloat16 (2, 1, 8)"):
            mv.mvsplit_rmsnorm_with_mean(x, x, a, a, jx=x[:, :1])
        with self.refuses(f"jx must be on {x.device}"):
            mv.mvsplit_rmsnorm_with_mean(x, x, a, a, jx=torch.zeros(2, 1, 8, device="meta"))

    def test_many_segments_of_any_length(self):
        """Segments of one token, of fewer and of more tokens than the rows of a program."""
        segments = (1, 16, 17, 1, 33, 2, 15, 1)
        inputs = double(make(self.variants["plain"], segments=segments, B=1))
        self._equals_the_definition(self.variants["plain"], inputs)

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
