"""Rectified flow: path, times, loss, guidance, samplers.

    z_t = (1 - t) x0 + t x1,  x0 data, x1 noise, t from 0 (data) to 1 (noise)
    v   = SIGN (x0 - x1), the prediction of the model

Rectified flow: Liu et al., arXiv 2209.03003. Time shift: Esser et al., arXiv 2403.03206.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.rng import normal

# +1: the velocity points from noise to data, as in arXiv 2605.06169; -1 is the convention of SD3,
# FLUX and diffusers. All signs below follow from this constant.
SIGN = 1.0


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """Return z_t for times t (B,)."""
    t = t.view(-1, *[1] * (x0.dim() - 1)).to(x0.dtype)
    return (1 - t) * x0 + t * x1


def velocity(x0: Tensor, x1: Tensor) -> Tensor:
    return SIGN * (x0 - x1)


def shift(t: Tensor, a: float) -> Tensor:
    """Return t' = a t / (1 + (a - 1) t); a > 1 moves times towards the noise."""
    return a * t / (1 + (a - 1) * t)


def times(u: Tensor, distribution: str, a: float) -> Tensor:
    """Return training times, uniform or logit-normal and then shifted, from u uniform in [0, 1)."""
    if distribution == "logit_normal":
        u = torch.special.expit(torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)))
    return shift(u, a)


def loss_per_sample(v: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """Return the mean squared error of v in each sample, (B,), float32."""
    error = v.float() - velocity(x0, x1).float()
    return error.square().flatten(1).mean(1)


def guided_velocity(
    model: Callable[[Tensor, Tensor], Tensor], text: Tensor, empty: Tensor, scale: float
) -> Callable[[Tensor], Tensor]:
    """Return v(z) = v_u + scale (v_c - v_u), classifier-free guidance of a model.

    text (B, tokens, width) are the conditions and empty (tokens, width) is the empty caption. With
    scale 1 there is only the conditional forward pass.
    """

    def v(z: Tensor) -> Tensor:
        if scale == 1:
            return model(z, text)
        texts = torch.cat((text, empty.to(text).expand_as(text)))
        conditional, unconditional = model(torch.cat((z, z)), texts).float().chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return v


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return x1 (len(seeds), *shape); the noise of an image depends only on its seed."""
    return torch.cat([normal(seed, "sample", 0, [0], shape) for seed in seeds])


@torch.no_grad()
def integrate(
    v: Callable[[Tensor], Tensor],
    z: Tensor,
    steps: int,
    a: float = 1.0,
    method: str = "euler",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return x0: integrate v from noise z at t = 1 to t = 0 in `steps` steps of shifted time.

    euler evaluates v once per step; heun (Karras et al., arXiv 2206.00364) twice, except in the
    last step. progress is called with the number of steps taken and their total.
    """
    grid = shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), a).tolist()
    for i, (t, next_t) in enumerate(zip(grid, grid[1:], strict=False)):
        dt = SIGN * (t - next_t)  # dz/dt = x1 - x0 = -SIGN v
        slope = v(z).float()
        if method == "heun" and i < steps - 1:
            slope = (slope + v(z + dt * slope).float()) / 2
        z = z + dt * slope
        if progress:
            progress(i + 1, steps)
    return z
