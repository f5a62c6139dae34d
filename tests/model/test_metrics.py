"""Every metric against its definition in float64, with loops, pairs of tokens and J as a matrix."""

import pytest
import torch

import mvsplit_ops as mv
from model.config import preset
from model.nn.dit import build
from model.stability import metrics, taps
from model.train.optim import make_optimizer
from model.train.step import gradient_norms

SMALL = dict(depth=6, dim=32, heads=2, ffn=48, text_dim=32, threads=0)
SEGMENTS = (16, 4)


def exact_model(**changes):
    config = preset("tiny", **{**SMALL, "writer_init": "default", **changes})
    return build(config).double()


def token_mean_matrix(segments):
    return torch.block_diag(*(torch.full((n, n), 1 / n, dtype=torch.float64) for n in segments))


def mean_cosine(sample):
    """Return the mean over pairs of different tokens of (T, D)."""
    T = len(sample)
    pairs = [(i, j) for i in range(T) for j in range(T) if i != j]
    return sum(torch.cosine_similarity(sample[i], sample[j], 0) for i, j in pairs) / len(pairs)


def writer_gradient_by_definition(h, d, segments):
    """Return G_mean and G_ctr as sums of outer products over samples and tokens."""
    G_mean = torch.zeros(d.shape[2], h.shape[2], dtype=d.dtype)
    G_ctr = torch.zeros_like(G_mean)
    for hb, db in zip(h, d, strict=True):
        for hs, ds in zip(hb.split(segments), db.split(segments), strict=True):
            mh, md = hs.mean(0), ds.mean(0)
            G_mean += len(hs) * torch.outer(md, mh)
            for ht, dt in zip(hs, ds, strict=True):
                G_ctr += torch.outer(dt - md, ht - mh)
    return G_mean, G_ctr


@pytest.mark.parametrize("segments", [(7,), (3, 4), (1, 6), (6, 1), (2, 2, 3), (1,) * 7])
def test_the_parts_of_a_writers_gradient_sum_to_autograds_gradient(segments):
    h, d = torch.randn(2, 5, 7, 12, dtype=torch.float64) + 0.3
    writer = torch.nn.Linear(12, 12, bias=False).double()
    writer(h).backward(d)
    G_mean, G_ctr = metrics.writer_gradient(h, d, segments)
    scale = writer.weight.grad.norm()
    assert (G_mean + G_ctr - writer.weight.grad).norm() <= 1e-12 * scale
    for part, definition in zip(
        (G_mean, G_ctr), writer_gradient_by_definition(h, d, segments), strict=True
    ):
        assert (part - definition).norm() <= 1e-12 * scale


class Spy:
    """Stand-in for a probe that stores the tensors it is called with."""

    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def attention(self, q, k, x, segments):
        self.inputs["map"] = [t.detach() for t in (q, k, x)]
        return q

    def writer(self, f, name, h, x, segments):
        f.retain_grad()
        self.inputs[name], self.outputs[name] = (
            [t.detach() for t in (h.view(*x.shape[:2], -1), x)],
            f,
        )
        return f

    def trunk(self, y, segments):
        self.inputs["trunk"] = y.detach()
        return y


def trunk_by_definition(y, segments):
    row = {}
    for end, part in zip(("", "_text"), y.split(segments, 1), strict=True):
        J = token_mean_matrix((part.shape[1],))
        P = torch.eye(part.shape[1], dtype=y.dtype) - J
        row[f"tcs{end}"] = sum(map(mean_cosine, part)) / len(part)
        J, P = (sum(torch.linalg.norm(M @ sample) for sample in part) for M in (J, P))
        row[f"rho{end}"] = J / P
    return row


def attention_by_definition(q, k, x, segments):
    J = token_mean_matrix(segments)
    P = torch.eye(len(J), dtype=x.dtype) - J
    retained = leaked = centred = norms = diversity = n = 0
    for qb, kb, xb in zip(q, k, x, strict=True):
        for head in range(q.shape[2]):
            A = torch.softmax(qb[:, head] @ kb[:, head].T / q.shape[3] ** 0.5, 1)
            norms += torch.linalg.svdvals(P @ A @ P)[0]
            retained += torch.linalg.norm(P @ A @ P @ xb) ** 2
            leaked += torch.linalg.norm(J @ A @ P @ xb) ** 2
            centred += torch.linalg.norm(P @ xb) ** 2
            diversity += torch.linalg.norm(P @ A) / torch.linalg.norm(A)
            n += 1
    return {
        "contraction": norms / n, "retention": retained / centred,
        "leakage": (leaked / centred) ** 0.5, "row_diversity": diversity / n,
    }  # fmt: skip


def coherence_by_definition(h, d, segments):
    row = {}
    for end, hs, ds in zip(("", "_text"), h.split(segments, 1), d.split(segments, 1), strict=True):
        T, sums = hs.shape[1], torch.zeros(3, dtype=h.dtype)
        for hb, db in zip(hs, ds, strict=True):
            G = sum(torch.outer(db[t], hb[t]) for t in range(T))
            own = sum(db[t].norm() ** 2 * hb[t].norm() ** 2 for t in range(T))
            cosines = torch.stack([
                torch.cosine_similarity(hb[i], hb[j], 0) * torch.cosine_similarity(db[i], db[j], 0)
                for i in range(T) for j in range(T) if i != j
            ])  # fmt: skip
            kappas = (T - 1) * torch.stack([cosines.abs().mean(), cosines.mean()])
            sums += torch.stack([G.norm() ** 2 / own, *kappas])
        names = (f"{name}{end}" for name in ("A", "kappa", "kappa_signed"))
        row |= dict(zip(names, sums / len(h), strict=True))
    return row


def merge_by_definition(merge, x, f, segments):
    J = token_mean_matrix(segments)
    P = torch.eye(len(J), dtype=x.dtype) - J
    if isinstance(merge, mv.MVSplitRMSNorm):
        update = merge.beta * (P @ f) + merge.alpha * (J @ (f - x))
    else:
        update = f if merge.scale is None else merge.scale * f
    row = {}
    for end, branch in (("", f), ("_gated", update)):
        row[f"tr_ratio{end}"] = branch.norm() / x.norm()
        row[f"var_gain{end}"] = (P @ branch).norm() / (P @ x).norm()
    gains = {n: p for n, p in merge.named_parameters() if p.requires_grad}
    for name, p in gains.items():
        row |= {f"{name}_mean": p.mean(), f"{name}_min": p.min(), f"{name}_max": p.max()}
    return row


def definitions(block, spy, segments=SEGMENTS):
    """Return {metric: value} of a block whose tensors a spy stored, after backward."""
    row = trunk_by_definition(spy.inputs["trunk"], segments)
    row |= attention_by_definition(*spy.inputs["map"], segments)
    for name in metrics.WRITERS:
        (h, x), f = spy.inputs[name], spy.outputs[name]
        G_mean, G_ctr = writer_gradient_by_definition(h, f.grad, segments)
        whole = block.writers[name].weight.grad
        assert torch.allclose(G_mean + G_ctr, whole, rtol=1e-9, atol=1e-12)
        parts = {"G_mean": G_mean.norm(), "G_ctr": G_ctr.norm()}
        parts |= coherence_by_definition(h, f.grad, segments)
        parts |= merge_by_definition(block.merges[name], x, f.detach(), segments)
        row |= {f"{metric}_{name}": value for metric, value in parts.items()}
    for role, projection in (("Q", block.operator.q_proj), ("K", block.operator.k_proj)):
        row[f"grad_{role}"] = projection.weight.grad.norm()
    return row


def with_random_gains(model):
    """Perturb the gains, so that a lost sign or channel changes the metrics."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".alpha", ".beta", ".scale")):
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("residual", ["post", "layerscale", "rezero", "mvsplit", "attention_only"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_every_metric_equals_its_definition(residual, checkpointing):
    z, text = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 4, 32).double()
    changes = dict(residual=residual, init_alpha=0.2)
    spied = with_random_gains(exact_model(**changes))
    model = with_random_gains(exact_model(checkpointing=checkpointing, **changes))
    spies = {}
    for layer in taps.tapped_layers(6)[1:3]:
        spies[layer] = spied.blocks[layer].probe = Spy()
    probes = taps.attach(model)
    for m in (spied, model):
        m(z, text).square().sum().backward()
    for layer, spy in spies.items():
        got, want = probes[layer].take(), definitions(spied.blocks[layer], spy)
        assert got.keys() == want.keys()
        for metric, value in want.items():
            assert got[metric].dtype == torch.float64
            assert torch.allclose(got[metric], value.detach(), rtol=1e-6, atol=1e-12), metric


def test_micro_batches_are_summed_and_take_resets():
    z, text = torch.randn(4, 3, 8, 8).double(), torch.randn(4, 4, 32).double()
    whole, parts = exact_model(), exact_model()
    probes, probes_too = taps.attach(whole), taps.attach(parts)
    for _ in range(2):
        whole.zero_grad()
        parts.zero_grad()
        whole(z, text).square().sum().backward()
        for part in (slice(0, 1), slice(1, 4)):
            parts(z[part], text[part]).square().sum().backward()
        for layer, probe in probes.items():
            one, other = probe.take(), probes_too[layer].take()
            for metric, value in one.items():
                assert torch.allclose(value, other[metric], equal_nan=True), (layer, metric)


def test_spectral_norm_is_the_largest_singular_value():
    t = torch.randn(9, 20, 20, dtype=torch.float64) * torch.logspace(-6, 6, 9)[:, None, None]
    exact = torch.linalg.svdvals(t)[:, 0]
    assert torch.allclose(metrics.spectral_norm(t), exact, rtol=1e-6)
    assert torch.allclose(metrics.spectral_norm(t.float()), exact.float(), rtol=1e-4)
    assert metrics.spectral_norm(torch.zeros(2, 5, 5)).tolist() == [0, 0]
    equal = metrics.spectral_norm(torch.eye(68)[None])  # the worst case
    assert 1 <= equal.item() <= 68 ** (1 / 2 ** (metrics.SQUARINGS + 1)) + 1e-5


def test_amplification_does_not_depend_on_the_scale_of_the_gradient():
    h, d = torch.randn(2, 3, 8, 16)
    want = metrics.writer_sums(h, d, (6, 2))
    for size in (1e-18, 1e18):
        for name, value in metrics.writer_sums(h, size * d, (6, 2)).items():
            assert torch.allclose(value, want[name], rtol=1e-4), (name, size)


def test_maps_are_processed_in_parts(monkeypatch):
    z, text = torch.randn(5, 3, 8, 8).double(), torch.randn(5, 4, 32).double()
    rows = []
    for elements in (1 << 24, 2 * 2 * 20 * 20):
        monkeypatch.setattr(taps, "MAP_ELEMENTS", elements)
        model = exact_model()
        probes = taps.attach(model)
        model(z, text).square().sum().backward()
        rows.append(probes[3].take())
    for name in ("contraction", "retention", "leakage", "row_diversity"):
        assert torch.allclose(rows[0][name], rows[1][name]), name


def test_a_segment_of_one_token_has_no_pairs():
    y, h, d = torch.randn(3, 2, 5, 16).unbind()
    assert "tcs_text" not in metrics.trunk_sums(y, (4, 1))
    assert metrics.writer_sums(h, d, (4, 1)).keys() == {"A", "kappa", "kappa_signed"}


def test_a_token_with_a_zero_gradient_has_cosine_zero():
    """The gradient is zero for the text of the last block and for one token of the image."""
    h, d = torch.randn(2, 2, 8, 16, dtype=torch.float64)
    d[:, 0] = 0
    d[:, 6:] = 0
    sums = metrics.writer_sums(h, d, (6, 2))
    assert sums["kappa"] > 0 and sums["kappa"].isfinite()
    assert sums["kappa_text"] == 0 and sums["A_text"].isnan()


def test_equal_tokens_have_the_metrics_of_a_collapsed_trunk():
    """If all tokens are equal, TCS is 1, rho is unbounded and the centred parts are 0."""
    model = exact_model(depth=1)
    (probe,) = taps.attach(model).values()
    block = model.blocks[0]
    x = torch.randn(2, 1, 32).double().expand(2, 20, 32).contiguous()
    cos, sin = torch.ones(20, 8), torch.zeros(20, 8)
    with mv.use_backend("reference"):
        y, _ = block(x, None, cos, sin, SEGMENTS)
    y.sum().backward()
    got = probe.take()
    assert got["tcs"] == pytest.approx(1.0) and got["rho"] > 1e5
    assert got["row_diversity"] < 1e-12 and got["contraction"] < 1e-12
    for name in metrics.WRITERS:
        assert got[f"G_ctr_{name}"] < 1e-12 * got[f"G_mean_{name}"]


def test_totals_by_role_are_norms_over_their_parameters():
    model = exact_model(depth=9, residual="layerscale")
    optimizer = make_optimizer(model, model.config)
    model(torch.randn(2, 3, 8, 8).double(), torch.randn(2, 4, 32).double()).sum().backward()
    recorder = taps.Recorder(model, optimizer)
    recorder.record(1, torch.tensor(0.5).double(), gradient_norms(optimizer), torch.ones(2, 4))
    (row,) = recorder.rows()
    names = dict(Q="operator.q_proj", K="operator.k_proj", WO="operator.proj", W2="ffn.w2")
    for role, name in names.items():
        grads = [model.get_parameter(f"blocks.{i}.{name}.weight").grad for i in range(9)]
        for part, subset in (("global", grads), ("deep", grads[6:])):  # 6 is 0.75 x 8
            assert row[f"{part}_{role}"] == pytest.approx(torch.stack(subset).norm().item())
    every = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert row["grad_norm"] == pytest.approx(every.norm().item())
