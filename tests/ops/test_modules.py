"""The modules that own parameters."""

import torch

import mvsplit_ops as mv


def test_parameters_and_defaults():
    module = mv.MVSplitRMSNorm(16)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        "alpha": (16,),
        "beta": (16,),
    }
    assert not module.alpha.any() and module.beta.eq(1).all() and module.eps == 1e-5
    other = mv.MVSplitRMSNorm(8, init_alpha=0.5, init_beta=0.03, eps=1e-6)
    assert other.alpha.eq(0.5).all() and torch.allclose(other.beta, torch.tensor(0.03))
    assert repr(other) == "MVSplitRMSNorm(8, init_alpha=0.5, init_beta=0.03, eps=1e-06)"


def test_forward_is_the_operator():
    module = mv.MVSplitRMSNorm(16, init_alpha=0.2, init_beta=0.7, eps=1e-3)
    x, f = (torch.randn(2, 6, 16, dtype=torch.bfloat16) for _ in "xf")
    for segments in (None, (4, 2)):
        want = mv.mvsplit_rmsnorm(x, f, module.alpha, module.beta, segments=segments, eps=1e-3)
        assert torch.equal(module(x, f, segments), want)
    module(x, f).sum().backward()
    assert module.alpha.grad.dtype == torch.float32 and module.beta.grad.any()


def test_a_chain_of_merges_carries_the_mean():
    module = mv.MVSplitRMSNorm(16, init_alpha=0.2, init_beta=0.7)
    x, f = (torch.randn(2, 6, 16) for _ in "xf")
    y, jy = module(x, f, (4, 2), carry=True)
    assert torch.equal(y, module(x, f, (4, 2)))
    assert torch.allclose(jy, mv.reference.segment_means(y, (4, 2)))
    plain = module(y, f, (4, 2))
    assert torch.allclose(module(y, f, (4, 2), jx=jy), plain, atol=1e-6)
    last, mean = module(y, f, (4, 2), jx=jy, carry=True)
    assert torch.allclose(last, plain, atol=1e-6) and mean.shape == (2, 2, 16)


def test_meta_device_has_shapes_and_runs_nothing():
    with torch.device("meta"):
        module, x = mv.MVSplitRMSNorm(16), torch.empty(2, 6, 16)
    y = module(x, x, (4, 2))
    assert y.device.type == "meta" and y.shape == x.shape
    y.sum().backward()
    assert module.alpha.grad.device.type == "meta"
    real = module.to_empty(device="cpu")
    real.reset_parameters()
    assert not real.alpha.any() and real.beta.eq(1).all()
