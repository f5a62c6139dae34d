"""The model compared with an independent float64 forward pass; policies; published layout."""

import collections
import functools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mvsplit_ops as mv
from bench.common.accuracy import require_accurate
from bench.static.traffic import Recorder
from model.config import RESIDUALS, preset
from model.data import open_dataset
from model.nn import flow
from model.nn.dit import build, rope_tables
from model.train.step import compute_gradients, draw_batch
from tests.model.small_models import small_config

GPU = torch.cuda.is_available()
small = functools.partial(small_config, depth=4, threads=0)


def make_random_model(config, seed=0):
    """Return a model without parameters that are zero, which would hide an error of a term."""
    model, generator = build(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def published_forward(state, z, text, heads, depth, patch):
    """Return the result of the published model in float64, written out, for its state dict."""
    w = {name: t.double() for name, t in state.items()}
    z, text = z.double(), text.double()

    def rms(t, eps):
        return t / torch.sqrt((t * t).mean(-1, keepdim=True) + eps)

    B, C, height, width = z.shape
    rows, columns = height // patch, width // patch
    kernel = w["patch_embed.patch_proj.weight"].flatten(1)
    patches = torch.nn.functional.unfold(z, patch, stride=patch).transpose(1, 2)
    image = patches @ kernel.T + w["patch_embed.patch_proj.bias"]
    if "context_proj.weight" in w:
        text = text @ w["context_proj.weight"].T
    image, text = rms(image, 1e-5), rms(text, 1e-5)
    x, n = torch.cat([image, text], 1), rows * columns
    D = x.shape[-1]
    Dh = D // heads
    inverse = [10000 ** (-2 * i / (Dh // 2)) for i in range(Dh // 4)]
    angle = torch.zeros(x.shape[1], Dh // 2, dtype=torch.float64)
    for i in range(n):
        r, c = divmod(i, columns)
        angle[i] = torch.tensor([r * f for f in inverse] + [c * f for f in inverse])

    def rotate_and_normalise(t):  # by minus the angle, on half-split pairs
        t = t.unflatten(-1, (heads, Dh)).transpose(1, 2)
        a, b = t[..., : Dh // 2], t[..., Dh // 2 :]
        t = torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], -1)
        return rms(t, 1e-6)

    def merge(x, f, name):
        alpha, beta = w[f"{name}.alpha"], w[f"{name}.beta"]
        parts = []
        for s in (slice(0, n), slice(n, None)):
            mx, mf = x[:, s].mean(1, keepdim=True), f[:, s].mean(1, keepdim=True)
            parts.append(x[:, s] + beta * (f[:, s] - mf) + alpha * (mf - mx))
        return rms(torch.cat(parts, 1), 1e-5)

    for i in range(depth):
        block = f"blocks.{i}"
        q, k, v = (x @ w[f"{block}.operator.{m}_proj.weight"].T for m in "qkv")
        weights = (rotate_and_normalise(q) @ rotate_and_normalise(k).mT / math.sqrt(Dh)).softmax(-1)
        heads_out = weights @ v.unflatten(-1, (heads, Dh)).transpose(1, 2)
        f = heads_out.transpose(1, 2).flatten(2) @ w[f"{block}.operator.proj.weight"].T
        x = merge(x, f, f"{block}.fused_mvsplit_norm1")
        gate, value = (x @ w[f"{block}.ffn.w13.weight"].T).chunk(2, -1)
        f = (gate * torch.sigmoid(gate) * value) @ w[f"{block}.ffn.w2.weight"].T
        x = merge(x, f, f"{block}.fused_mvsplit_norm2")
    out = x[:, :n] @ w["final_proj.weight"].T + w["final_proj.bias"]
    out = out.view(B, rows, columns, patch, patch, C)
    return torch.einsum("bhwpqc->bchpwq", out).reshape(B, C, height, width)


@pytest.mark.parametrize("layout", ["kernels", "eager fallback"])
@pytest.mark.parametrize("text_dim", [32, 24])
@pytest.mark.parametrize("patch", [1, 2])
def test_a_published_checkpoint_loads_strictly_and_gives_the_same_result(layout, text_dim, patch):
    config = small(text_dim=text_dim, patch=patch, size=8, channels=5, data="latents")
    state = {n: t.clone() for n, t in make_random_model(config).state_dict().items()}
    if layout == "eager fallback":
        for i in range(config.depth):
            for norm in ("fused_mvsplit_norm1", "fused_mvsplit_norm2"):
                state[f"blocks.{i}.{norm}.weight"] = torch.ones(32)
            for norm in ("query_norm", "key_norm"):
                state[f"blocks.{i}.operator.qk_norm.{norm}.weight"] = torch.ones(16)
    model = build(config)
    model.load_state_dict(state, strict=True)
    z, text = torch.randn(2, 5, 8, 8), torch.randn(2, 4, text_dim)
    exact = published_forward(state, z, text, heads=2, depth=config.depth, patch=patch)
    with mv.use_backend("reference"):
        eager = model(z, text)
    require_accurate(f"DiT, {layout}", model(z, text), eager, exact)
    assert (eager - exact).abs().max() < 1e-4


def test_parameters_have_the_published_names():
    with torch.device("meta"):
        names = set(build(small(depth=1), "meta").state_dict())
    assert names == {
        "patch_embed.patch_proj.weight", "patch_embed.patch_proj.bias",
        "norm_img_input.weight", "norm_text_input.weight",
        *(f"blocks.0.fused_mvsplit_norm{i}.{p}" for i in "12" for p in ("alpha", "beta")),
        *(f"blocks.0.operator.{p}.weight" for p in ("q_proj", "k_proj", "v_proj", "proj")),
        "blocks.0.ffn.w13.weight", "blocks.0.ffn.w2.weight",
        "final_proj.weight", "final_proj.bias",
    }  # fmt: skip


def test_norm_weights_other_than_ones_are_an_error():
    model = build(small())
    state = {**model.state_dict(), "blocks.1.fused_mvsplit_norm2.weight": torch.full((32,), 1.1)}
    with pytest.raises(RuntimeError, match="blocks.1.fused_mvsplit_norm2.weight must be ones"):
        model.load_state_dict(state)


@pytest.mark.parametrize(("name", "billions"), [("dit400-mvsplit", 5.4545), ("dit1000-mvsplit", 13.636)])  # fmt: skip  # noqa: E501
def test_paper_models_have_their_size_and_allocate_nothing_on_meta(name, billions):
    model = build(preset(name), "meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=5e-5)


def test_rope_does_not_rotate_text_and_rows_come_before_columns():
    cos, sin = rope_tables(3, 5, 2, 32)
    assert cos.shape == sin.shape == (17, 16)
    assert cos[15:].eq(1).all() and sin[15:].eq(0).all() and sin[0].eq(0).all()
    assert torch.allclose(sin[1 * 5 + 3, 0], torch.tensor(1.0).sin())
    assert torch.allclose(sin[1 * 5 + 3, 8], torch.tensor(3.0).sin())


@pytest.mark.parametrize("residual", RESIDUALS)
def test_each_residual_computes_its_formula(residual):
    config = small(residual=residual, init_alpha=0.3, init_beta=0.7, init_scale=0.4)
    model = build(config)
    x, f, segments = torch.randn(2, 10, 32), torch.randn(2, 10, 32), (6, 4)
    split = mv.reference.mvsplit_rmsnorm
    full = torch.full((32,), 0.3), torch.full((32,), 0.7), None, segments
    expected = {
        "post": lambda: mv.reference.residual_rmsnorm(x, f),
        "layerscale": lambda: mv.reference.residual_rmsnorm(x, f, torch.tensor(0.4)),
        "rezero": lambda: mv.reference.rms_norm(x, None, 1e-5),
        "mvsplit": lambda: split(x, f, *full),
        "hard_center": lambda: split(x, f, torch.zeros(32), torch.ones(32), None, segments),
        "attention_only": lambda: split(x, f, *full),
    }
    second = "post" if residual == "attention_only" else residual
    block = model.blocks[1]
    for merge, name in ((block.fused_mvsplit_norm1, residual), (block.fused_mvsplit_norm2, second)):
        assert torch.allclose(merge(x, f, segments), expected[name](), atol=1e-5), name


def test_hard_center_has_no_trainable_gains():
    model = build(small(residual="hard_center"))
    gains = [p for n, p in model.named_parameters() if "fused" in n]
    assert gains and not any(p.requires_grad for p in gains)
    assert all(p.requires_grad for n, p in model.named_parameters() if "fused" not in n)


@pytest.mark.parametrize("writer_init", ["zero", "default", "normal"])
def test_writer_init_changes_only_the_writers(writer_init):
    model, default = build(small(writer_init=writer_init)), build(small(writer_init="default"))
    bound = 1 / math.sqrt(48)
    for block, other in zip(model.blocks, default.blocks, strict=True):
        w = block.ffn.w2.weight
        if writer_init == "zero":
            assert not w.any() and not block.operator.proj.weight.any()
        elif writer_init == "default":
            assert w.abs().max() <= bound and w.std().item() == pytest.approx(
                bound / 3**0.5, rel=0.1
            )
        else:
            assert w.std().item() == pytest.approx(0.02, rel=0.1)
        assert torch.equal(block.operator.q_proj.weight, other.operator.q_proj.weight)
    again = build(small(writer_init=writer_init))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def take_step(config, seed=0):
    """Return the loss and gradients of one step of a random model."""
    model = make_random_model(config, seed)
    batch = draw_batch(config, open_dataset(config), 0)
    loss, _ = compute_gradients(config, model, batch, "cpu")
    return loss, [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("policy", ["full", "3/4", "1/2", "selective"])
@pytest.mark.parametrize("carry_mean", [False, True])
def test_recomputation_is_bit_identical(policy, carry_mean):
    loss, grads = take_step(small(carry_mean=carry_mean))
    again, grads_again = take_step(small(carry_mean=carry_mean, checkpointing=policy))
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


@pytest.mark.parametrize("residual", ["mvsplit", "attention_only", "hard_center", "post"])
def test_carrying_the_mean_changes_only_rounding(residual):
    loss, grads = take_step(small(residual=residual))
    carried, grads_carried = take_step(small(residual=residual, carry_mean=True))
    assert torch.allclose(loss, carried, rtol=1e-5)
    for a, b in zip(grads, grads_carried, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * a.abs().max().item())


class CallCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function._schema.name.split("::")[1]] += 1
        return function(*args, **(kwargs or {}))


def count_calls(**changes):
    with CallCounter() as counter:
        take_step(small(**changes))
    return counter.calls


def test_three_of_four_policy_has_the_call_counts_of_the_paper():
    """700 forward and 400 backward calls at 400 blocks, twice for merges: 14 and 8 at 8 blocks."""
    calls = count_calls(depth=8, checkpointing="3/4")
    for op, n in (("rope_qk_norm", 1), ("swiglu", 1), ("mvsplit_rmsnorm", 2)):
        assert calls[f"{op}_fwd"] == n * 8 * 700 // 400, op
        assert calls[f"{op}_bwd"] == n * 8, op


def test_selective_policy_recomputes_cheap_operators_and_no_matrix_product():
    plain, selective, full = (count_calls(checkpointing=p) for p in ("none", "selective", "full"))
    cheap = [op.__name__.removesuffix(".default") for op in mv.recompute_cheap_ops()]
    for name in (n for n in cheap if plain[n]):
        assert selective[name] == full[name] == 2 * plain[name], name
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    for name in ("mm", attention):
        assert selective[name] == plain[name] < full[name], name


@pytest.mark.parametrize("residual", ["mvsplit", "layerscale"])
def test_a_compiled_block_gives_the_same_gradients(residual):
    config = small(depth=2, residual=residual)
    model, compiled = make_random_model(config), make_random_model(config)
    for block in compiled.blocks:
        block.compile(fullgraph=True)
    z, text = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 32)
    for m in (model, compiled):
        m(z, text).square().mean().backward()
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5 * a.grad.abs().max().item())


def test_recomputed_blocks_run_on_the_backend_of_their_forward():
    model = make_random_model(small(checkpointing="full"))
    z, text = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 32)
    with mv.use_backend("reference"):
        v = model(z, text)
    with Recorder() as recorder:
        v.square().mean().backward()
    assert not recorder.calls


def descend(config, dtype, backend, steps, device):
    """Return a batch's losses and all gradients after `steps` of plain gradient descent."""
    model, dataset = make_random_model(config).to(device, dtype), open_dataset(config)
    for step in range(steps):
        batch = draw_batch(config, dataset, step)
        x0, x1, text = (t.to(device, dtype) for t in (batch.x0, batch.x1, batch.text))
        z = flow.interpolate(x0, x1, batch.t.to(device))
        with mv.use_backend(backend):
            v = model(z, text)
        losses = (v - flow.velocity(x0, x1)).square().flatten(1).mean(1)
        grads = torch.autograd.grad(losses.mean(), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p.sub_(0.01 * g)
    return losses.detach(), torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize(("backend", "steps"), [("cpu", 1), ("cpu", 20), ("triton", 1)])
@pytest.mark.parametrize("residual", ["mvsplit", "layerscale"])
def test_fused_operators_meet_the_accuracy_rule_in_training(residual, backend, steps):
    depth = 1 if backend == "triton" and not GPU else 4  # interpreted
    config = small(residual=residual, init_scale=0.3, batch=16, depth=depth)
    device = "cuda" if GPU and backend == "triton" else "cpu"
    exact = descend(config, torch.float64, "reference", steps, device)
    eager = descend(config, torch.float32, "reference", steps, device)
    fused = descend(config, torch.float32, backend, steps, device)
    for name, *values in zip(("losses", "gradients"), fused, eager, exact, strict=True):
        require_accurate(f"{residual}, {name} after {steps} steps", *values)
