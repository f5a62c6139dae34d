"""One optimizer step: exact means, what is drawn, the learning rate, the update, the average."""

import pytest
import torch

from model.config import preset
from model.data import open_dataset
from model.nn.dit import build
from model.train.optim import Average, learning_rate, make_optimizer
from model.train.step import draw_batch, gradient_norm, gradients, update

SMALL = dict(depth=3, dim=32, heads=2, ffn=48, text_dim=32, batch=4, warmup=5, threads=1)


def small(**changes):
    return preset("tiny", **{**SMALL, "steps": 20, **changes})


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 6])
def test_accumulation_is_the_mean_over_the_batch(micro_batch):
    """Also where the last micro-batch is smaller."""

    def run(**changes):
        config = small(batch=6, writer_init="default", **changes)
        model = build(config)
        batch = draw_batch(config, open_dataset(config), 3)
        loss, quarters = gradients(config, model, batch, "cpu")
        norm = gradient_norm(make_optimizer(model, config))
        return [loss, norm, quarters, *(p.grad for p in model.parameters())]

    for a, b in zip(run(), run(micro_batch=micro_batch), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_by_time_adds_up():
    config = small(batch=32)
    batch = draw_batch(config, open_dataset(config), 0)
    loss, (sums, counts) = gradients(config, build(config), batch, "cpu")
    assert counts.sum() == 32 and torch.allclose(sums.sum() / 32, loss)
    assert counts[0] == (batch.t < 0.25).sum()


def test_a_time_that_rounds_to_one_is_of_the_last_quarter():
    """Of 50,000 steps of 1024 samples some come so near to 1."""
    config = small()
    batch = draw_batch(config, open_dataset(config), 0)
    batch.t[2] = 1.0
    loss, (_, counts) = gradients(config, build(config), batch, "cpu")
    assert torch.isfinite(loss) and counts[3] >= 1 and counts.sum() == 4


def test_a_batch_is_its_step_and_drops_captions_at_the_rate():
    config = small(batch=64, caption_drop=0.3)
    dataset = open_dataset(config)
    one, again, other = (draw_batch(config, dataset, step) for step in (5, 5, 6))
    assert all(torch.equal(getattr(one, f), getattr(again, f)) for f in ("x0", "x1", "t", "text"))
    assert not any(torch.equal(getattr(one, f), getattr(other, f)) for f in ("x0", "x1", "t"))
    assert torch.equal(other.x0[0], dataset.get(6 * 64)[0])
    dropped = sum(torch.equal(t, dataset.empty) for t in one.text)
    assert 10 <= dropped <= 30


def test_warm_up_then_constant_and_decay_on_matrices_alone():
    config = small(lr=1.0, warmup=4)
    assert [learning_rate(config, s) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    model = build(small(residual="layerscale"))
    groups = {g["name"]: g for g in make_optimizer(model, config).param_groups}
    assert groups["matrices"]["weight_decay"] == 0.1
    assert groups["gains and biases"]["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    flat = {names[id(p)] for p in groups["gains and biases"]["params"]}
    assert flat == {n for n in names.values() if n.endswith(("bias", "scale"))}
    both = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(both) == sorted(names)


def test_the_update_is_clipped_adamw():
    config = small(clip=0.5, lr=1e-2, warmup=0)
    model, other = build(config), build(config)
    batch = draw_batch(config, open_dataset(config), 0)
    optimizer = make_optimizer(model, config)
    gradients(config, model, batch, "cpu")
    norm = gradient_norm(optimizer)
    every = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(norm, every.norm())
    update(config, 0, optimizer, norm)
    gradients(config, other, batch, "cpu")
    for p in other.parameters():
        g = p.grad.double() * min(1, 0.5 / (norm.double() + 1e-6))
        decay = 1e-2 * (0.1 if p.dim() >= 2 else 0.0)
        step = 1e-2 * g / (g.abs() + config.adam_eps)  # the first step of Adam, bias-corrected
        p.data = (p.double() * (1 - decay) - step).float()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


def test_the_average_follows_and_is_swapped_in_for_a_while_only():
    model = torch.nn.Linear(4, 4)
    average, want = Average(model, 0.75), model.weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(torch.randn(4, 4))
        average.update()
        want = 0.75 * want + 0.25 * model.weight.detach()
    own = model.weight.detach().clone()
    with pytest.raises(KeyError), average.applied():
        assert torch.allclose(model.weight, want)
        raise KeyError
    assert torch.equal(model.weight, own)
    assert not Average(model, 0.0).tensors
