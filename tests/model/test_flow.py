"""Rectified flow and the random numbers that it uses."""

import pytest
import torch

from model import rng
from model.nn import flow


def test_velocity_points_from_noise_to_data():
    """One Euler step along the true velocity from pure noise yields the data."""
    x0, x1 = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(flow.velocity(x0, x1), x0 - x1)  # the paper's sign
    assert torch.allclose(flow.integrate(lambda z: flow.velocity(x0, x1), x1, 1), x0, atol=1e-6)
    half = flow.interpolate(x0, x1, torch.full((2,), 0.5))
    assert torch.allclose(half, (x0 + x1) / 2)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_all_signs_follow_from_the_constant(monkeypatch, sign, method):
    monkeypatch.setattr(flow, "SIGN", sign)
    x0, x1 = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    v = flow.velocity(x0, x1)
    assert flow.loss_per_sample(v, x0, x1).eq(0).all()
    assert torch.allclose(flow.integrate(lambda z: v, x1, 5, 4.0, method), x0, atol=1e-5)


def test_heun_is_second_order_and_euler_first_order():
    """On dz/dt = z twice as many steps reduce the error by 4 and by 2."""
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def error(method, steps):  # t runs from 1 to 0, so z(0) = z(1) / e
        v = flow.integrate(lambda z: -flow.SIGN * z.double(), start, steps, 1.0, method)
        return abs(v.item() - torch.e**-1)

    euler, heun = (error(m, 32) / error(m, 64) for m in ("euler", "heun"))
    assert 1.8 < euler < 2.2 and 3.0 < heun < 4.5


def test_shift_keeps_the_ends_and_moves_times_towards_noise():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(flow.shift(t, 1.0), t)
    shifted = flow.shift(t, 4.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] > t[1:-1]).all()
    assert shifted[5].item() == pytest.approx(4 * 0.5 / 2.5)


def test_times_have_the_chosen_distribution():
    u = torch.rand(20_000, dtype=torch.float64)
    assert torch.equal(flow.times(u, "uniform", 1.0), u)
    t = flow.times(u, "logit_normal", 1.0)
    logits = torch.logit(t)
    assert abs(logits.mean()) < 0.03 and abs(logits.std() - 1) < 0.03
    assert torch.isfinite(flow.times(torch.zeros(3, dtype=torch.float64), "logit_normal", 1)).all()


def test_guidance_interpolates_and_extrapolates_two_predictions():
    def model(z, text):
        return z * text.sum((1, 2)).view(-1, 1, 1, 1)

    z, text, empty = torch.randn(2, 3, 4, 4), torch.rand(2, 4, 8), torch.rand(4, 8)
    conditional, unconditional = model(z, text), model(z, empty.expand(2, -1, -1))
    for scale in (0.0, 1.0, 2.5):
        want = unconditional + scale * (conditional - unconditional)
        assert torch.allclose(flow.guided_velocity(model, text, empty, scale)(z), want, atol=1e-5)


def test_a_stream_depends_on_seed_purpose_step_and_sample():
    names = [(0, "noise", 0, 0), (1, "noise", 0, 0), (0, "time", 0, 0), (0, "noise", 1, 0),
             (0, "noise", 0, 1)]  # fmt: skip
    draws = [rng.stream(*name).standard_normal() for name in names]
    assert len(set(draws)) == len(draws)
    assert draws == [rng.stream(*name).standard_normal() for name in names]
    whole = rng.normal(3, "noise", 7, range(6), (2, 3))
    parts = [rng.normal(3, "noise", 7, range(i, i + 2), (2, 3)) for i in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert rng.uniform(0, "time", 0, range(3)).dtype == torch.float64  # float32 may round to 1
    assert abs(rng.normal(0, "noise", 0, range(200), (100,)).std() - 1) < 0.02
    assert 0.45 < rng.uniform(0, "time", 0, range(2000)).mean() < 0.55


def test_initial_noise_depends_only_on_the_seed():
    a = flow.initial_noise([5, 6], (3, 4, 4))
    b = flow.initial_noise([9, 5, 1], (3, 4, 4))
    assert torch.equal(a[0], b[1]) and not torch.equal(a[0], a[1])
