"""Rectified flow: the path, its times, the loss, the samplers.

    z_t = (1 - t) x0 + t x1,  x0 data, x1 noise, t from 0 (data) to 1 (noise)
    v   = SIGN (x0 - x1): what the model predicts

Liu et al., arXiv 2209.03003; the time shift: Esser et al., arXiv 2403.03206.
"""

import torch

from model.rng import normal

# +1: the velocity points from noise to data, as in the paper. -1 would be the convention of SD3,
# FLUX and diffusers. Every sign below follows from it.
SIGN = 1.0


def interpolate(x0, x1, t):
    """z_t; t (B,)."""
    t = t.view(-1, *[1] * (x0.dim() - 1)).to(x0.dtype)
    return (1 - t) * x0 + t * x1


def velocity(x0, x1):
    return SIGN * (x0 - x1)


def shift(t, a):
    """t' = a t / (1 + (a - 1) t): more time at the noisy end for a > 1."""
    return a * t / (1 + (a - 1) * t)


def times(u, distribution, a):
    """Training times from u uniform in [0, 1): uniform or logit-normal, then shifted."""
    if distribution == "logit_normal":
        u = torch.special.expit(torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)))
    return shift(u, a)


def loss_per_sample(v, x0, x1):
    """mean |v - velocity|^2 of each sample, (B,), float32."""
    error = v.float() - velocity(x0, x1).float()
    return error.square().flatten(1).mean(1)


def guided(model, text, empty, scale):
    """v(z) = v_u + scale (v_c - v_u), classifier-free guidance; one forward pass when scale is 1.

    text (B, tokens, width) are the conditions, empty (tokens, width) the empty caption.
    """

    def v(z):
        if scale == 1:
            return model(z, text)
        both = torch.cat((text, empty.to(text).expand_as(text)))
        conditional, unconditional = model(torch.cat((z, z)), both).float().chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return v


def initial_noise(seeds, shape):
    """x1 (len(seeds), *shape): an image's noise is its seed's, whatever else is in the batch."""
    return torch.cat([normal(seed, "sample", 0, [0], shape) for seed in seeds])


@torch.no_grad()
def integrate(v, z, steps, a=1.0, method="euler", progress=None):
    """Follow v from t = 1, noise z, to t = 0 in `steps` steps of shifted time; returns x0.

    euler evaluates v once a step; heun (Karras et al., arXiv 2206.00364) twice but for the last.
    """
    grid = shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), a).tolist()
    for i, (t, after) in enumerate(zip(grid, grid[1:], strict=False)):
        dt = SIGN * (t - after)  # dz/dt = x1 - x0 = -SIGN v
        slope = v(z).float()
        if method == "heun" and i < steps - 1:
            slope = (slope + v(z + dt * slope).float()) / 2
        z = z + dt * slope
        if progress:
            progress(i + 1, steps)
    return z
