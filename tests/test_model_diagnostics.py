"""The measured quantities against their definitions, token by token, in float64."""

import pytest
import torch

import mvsplit_ops as mv
from model import diagnostics
from model.config import preset
from model.dit import build

SMALL = dict(depth=6, dim=32, heads=2, ffn=48, text_dim=32, threads=0)


def exact_model(**changes):
    config = preset("tiny", **{**SMALL, "writer_init": "default", **changes})
    return build(config).double()


def cosine_by_definition(x):
    """Mean over pairs of different tokens, then over samples."""
    total = 0.0
    for sample in x:
        unit = sample / sample.norm(dim=-1, keepdim=True)
        gram = unit @ unit.T
        T = len(sample)
        total += (gram.sum() - gram.trace()) / (T * (T - 1))
    return total / len(x)


def test_cosine_similarity_is_its_definition():
    x = torch.randn(5, 9, 16, dtype=torch.float64) + 0.5
    got = diagnostics.cosine_similarity_sum(x) / 5
    assert torch.allclose(got, cosine_by_definition(x), rtol=1e-12)
    same = torch.ones(2, 9, 16)
    assert torch.allclose(diagnostics.cosine_similarity_sum(same) / 2, torch.tensor(1.0))


def test_four_depths_are_tapped():
    assert diagnostics.tapped_layers(400) == [100, 200, 300, 399]
    assert diagnostics.tapped_layers(100) == [25, 50, 75, 99]
    assert diagnostics.tapped_layers(1) == [0]


class Spy:
    """In the place of a probe: keeps what the writers read and the gradients of what they write."""

    def __init__(self):
        self.read, self.written, self.trunks = {}, {}, []

    def writer(self, name, h, f, segments):
        f.retain_grad()
        self.read[name], self.written[name] = h.detach(), f
        return f

    def trunk(self, x, segments):
        self.trunks.append(x.detach())


def decomposed(h, d, segments):
    """G_mean and G_ctr as sums over samples and tokens of outer products."""
    G_mean = torch.zeros(d.shape[2], h.shape[2], dtype=d.dtype)
    G_ctr = torch.zeros_like(G_mean)
    for hb, db in zip(h, d, strict=True):
        for hs, ds in zip(hb.split(segments), db.split(segments), strict=True):
            mh, md = hs.mean(0), ds.mean(0)
            G_mean += len(hs) * torch.outer(md, mh)
            for ht, dt in zip(hs, ds, strict=True):
                G_ctr += torch.outer(dt - md, ht - mh)
    return G_mean, G_ctr


@pytest.mark.parametrize("residual", ["mvsplit", "layerscale"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_every_metric_is_its_definition(residual, checkpointing):
    z, text = torch.randn(3, 3, 8, 8).double(), torch.randn(3, 4, 32).double()
    changes = dict(residual=residual, init_alpha=0.2)
    spied, model = exact_model(**changes), exact_model(checkpointing=checkpointing, **changes)
    spies = {}
    for layer in diagnostics.tapped_layers(6):
        spies[str(layer)] = spied.blocks[layer].probe = Spy()
    spied(z, text).square().sum().backward()
    probes = diagnostics.attach(model)
    model(z, text).square().sum().backward()
    got = diagnostics.read(probes)
    segments = (16, 4)
    for layer, spy in spies.items():
        x = spy.trunks[0][:, :16]
        mean = x.mean(1, keepdim=True)
        assert got["tcs"][layer] == pytest.approx(cosine_by_definition(x).item(), rel=1e-5)
        rho = mean.expand_as(x).norm(dim=(1, 2)).mean() / (x - mean).norm(dim=(1, 2)).mean()
        assert got["rho"][layer] == pytest.approx(rho.item(), rel=1e-5)
        for name in diagnostics.WRITERS:
            d = spy.written[name].grad
            G_mean, G_ctr = decomposed(spy.read[name], d, segments)
            whole = spied.blocks[int(layer)].writers[name].weight.grad
            assert torch.allclose(G_mean + G_ctr, whole, rtol=1e-9, atol=1e-12)
            for metric, G in (("G_mean", G_mean), ("G_ctr", G_ctr)):
                value = got[f"{metric}_{name}"][layer]
                assert value == pytest.approx(G.norm().item(), rel=1e-5), (metric, name, layer)


def test_micro_batches_add_up_and_reading_starts_anew():
    z, text = torch.randn(4, 3, 8, 8).double(), torch.randn(4, 4, 32).double()
    whole, parts = exact_model(), exact_model()
    probes, probes_too = diagnostics.attach(whole), diagnostics.attach(parts)
    for _ in range(2):
        whole.zero_grad()
        parts.zero_grad()
        whole(z, text).square().sum().backward()
        for i in range(4):
            parts(z[i : i + 1], text[i : i + 1]).square().sum().backward()
        one, other = diagnostics.read(probes), diagnostics.read(probes_too)
        for metric in diagnostics.METRICS:
            assert one[metric] == pytest.approx(other[metric], rel=1e-5), metric


def test_a_probe_returns_the_very_gradient():
    model, probed = exact_model(), exact_model()
    diagnostics.attach(probed)
    z, text = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 4, 32).double()
    for m in (model, probed):
        m(z, text).square().sum().backward()
    for p, q in zip(model.parameters(), probed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_one_token_mean_for_all_is_a_locked_trunk():
    """Where all tokens are one, TCS is 1, rho unbounded and no centred gradient is left."""
    model = exact_model(depth=1)
    probes = diagnostics.attach(model)
    block = model.blocks[0]
    x = torch.randn(2, 1, 32).double().expand(2, 20, 32).contiguous()
    cos, sin = torch.ones(20, 8), torch.zeros(20, 8)
    with mv.use_backend("reference"):
        y, _ = block(x, None, cos, sin, (16, 4))
    y.sum().backward()
    got = diagnostics.read(probes)
    assert got["tcs"]["0"] == pytest.approx(1.0) and got["rho"]["0"] > 1e5
    for name in diagnostics.WRITERS:
        assert got[f"G_ctr_{name}"]["0"] < 1e-6 * max(got[f"G_mean_{name}"]["0"], 1)
