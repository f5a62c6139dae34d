"""One optimizer step: its batch, gradients, learning rate, update and averaged weights."""

import functools

import pytest
import torch

from model.data import open_dataset
from model.nn.dit import build
from model.train.optim import Average, learning_rate, make_optimizer
from model.train.step import compute_gradients, draw_batch, gradient_norm, update
from tests.model.small_models import small_config

small = functools.partial(small_config, depth=3, warmup=5, steps=20)


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 6])
def test_micro_batches_accumulate_the_mean_over_the_batch(micro_batch):
    """Also if the last micro-batch is smaller."""

    def run(**changes):
        config = small(batch=6, writer_init="default", **changes)
        model = build(config)
        batch = draw_batch(config, open_dataset(config), 3)
        loss, quarters = compute_gradients(config, model, batch, "cpu")
        norm = gradient_norm(make_optimizer(model, config))
        return [loss, norm, quarters, *(p.grad for p in model.parameters())]

    for a, b in zip(run(), run(micro_batch=micro_batch), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_losses_by_quarter_add_up_to_the_loss():
    config = small(batch=32)
    batch = draw_batch(config, open_dataset(config), 0)
    loss, (sums, counts) = compute_gradients(config, build(config), batch, "cpu")
    assert counts.sum() == 32 and torch.allclose(sums.sum() / 32, loss)
    assert counts[0] == (batch.t < 0.25).sum()


def test_a_time_that_rounds_to_one_is_in_the_last_quarter():
    """In 50,000 steps of 1024 samples some times are that close to 1."""
    config = small()
    batch = draw_batch(config, open_dataset(config), 0)
    batch.t[2] = 1.0
    loss, (_, counts) = compute_gradients(config, build(config), batch, "cpu")
    assert torch.isfinite(loss) and counts[3] >= 1 and counts.sum() == 4


def test_a_batch_depends_on_its_step_and_drops_captions_at_the_rate():
    config = small(batch=64, caption_drop=0.3)
    dataset = open_dataset(config)
    one, again, other = (draw_batch(config, dataset, step) for step in (5, 5, 6))
    assert all(torch.equal(getattr(one, f), getattr(again, f)) for f in ("x0", "x1", "t", "text"))
    assert not any(torch.equal(getattr(one, f), getattr(other, f)) for f in ("x0", "x1", "t"))
    assert torch.equal(other.x0[0], dataset.get(6 * 64)[0])
    dropped = sum(torch.equal(t, dataset.empty) for t in one.text)
    assert 10 <= dropped <= 30


def test_rate_is_constant_after_warm_up_and_decay_is_on_matrices_only():
    config = small(lr=1.0, warmup=4)
    assert [learning_rate(config, s) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    model = build(small(residual="layerscale"))
    groups = {g["name"]: g for g in make_optimizer(model, config).param_groups}
    assert groups["matrices"]["weight_decay"] == 0.1
    assert groups["gains and biases"]["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    flat = {names[id(p)] for p in groups["gains and biases"]["params"]}
    assert flat == {n for n in names.values() if n.endswith(("bias", "scale"))}
    grouped = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(grouped) == sorted(names)


def test_the_update_is_clipped_adamw():
    config = small(clip=0.5, lr=1e-2, warmup=0)
    model, other = build(config), build(config)
    batch = draw_batch(config, open_dataset(config), 0)
    optimizer = make_optimizer(model, config)
    compute_gradients(config, model, batch, "cpu")
    norm = gradient_norm(optimizer)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(norm, gradient.norm())
    update(config, 0, optimizer, norm)
    compute_gradients(config, other, batch, "cpu")
    for p in other.parameters():
        g = p.grad.double() * min(1, 0.5 / (norm.double() + 1e-6))
        decay = 1e-2 * (0.1 if p.dim() >= 2 else 0.0)
        step = 1e-2 * g / (g.abs() + config.adam_eps)  # the first step of Adam, bias-corrected
        p.data = (p.double() * (1 - decay) - step).float()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


def test_the_average_follows_the_weights_and_is_applied_temporarily():
    model = torch.nn.Linear(4, 4)
    average, expected = Average(model, 0.75), model.weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(torch.randn(4, 4))
        average.update()
        expected = 0.75 * expected + 0.25 * model.weight.detach()
    own = model.weight.detach().clone()
    with pytest.raises(KeyError), average.applied():
        assert torch.allclose(model.weight, expected)
        raise KeyError
    assert torch.equal(model.weight, own)
    assert not Average(model, 0.0).tensors
