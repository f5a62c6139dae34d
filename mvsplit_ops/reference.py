"""The definition of every operator: eager PyTorch, short enough to hold against the formula.

Autograd differentiates these functions; float64 inputs make them the exact result that every kernel
is judged against. The result has the dtype of the activations, whatever the parameters have.

B batch, T tokens, D width, H heads, Dh head width, F SwiGLU width, S segments.
X_l `x`, F_l `f`, X_{l+1} `y`, J X `jx`, J F `jf`, alpha `alpha`, beta `beta`, pre-norm sum `z`,
1/rms `rstd`; a gradient is `d` and the name. arXiv 2605.06169.
"""

import torch


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; a weight of None is 1."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def token_mean(t, segments):
    """J t: the token mean of each segment of t (B, T, D), broadcast back over its tokens."""
    parts = t.split(segments, dim=1)
    return torch.cat([p.mean(1, keepdim=True).expand_as(p) for p in parts], dim=1)


def segment_means(t, segments):
    """The token means of the segments of t, (B, S, D), in the dtype of accumulators."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    return torch.stack([p.mean(1) for p in t.split(segments, dim=1)], dim=1)


def rope(x, cos, sin, interleaved=False, conjugate=False):
    """Rotates the pair (x1, x2) by theta: o1 = x1 cos - x2 sin, o2 = x2 cos + x1 sin."""
    cos, sin = (t[..., : x.shape[1], :].unsqueeze(-2) for t in (cos, sin))  # (.., T, 1, Dh/2)
    if conjugate:
        sin = -sin
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
    o1, o2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    out = torch.stack((o1, o2), -1).flatten(-2) if interleaved else torch.cat((o1, o2), -1)
    return out.to(x.dtype)


def qk_norm(q, k, q_weight=None, k_weight=None, eps=1e-6):
    """RMSNorm over Dh of each head of q and of k."""
    return rms_norm(q, q_weight, eps).to(q.dtype), rms_norm(k, k_weight, eps).to(k.dtype)


def rope_qk_norm(
    q,
    k,
    cos,
    sin,
    q_weight=None,
    k_weight=None,
    eps=1e-6,
    interleaved=False,
    conjugate=False,
    norm_first=False,
):
    """qk_norm(rope(q), rope(k)), or rope of the normalised q and k when norm_first."""
    if norm_first:
        q, k = qk_norm(q, k, q_weight, k_weight, eps)
    q, k = (rope(t, cos, sin, interleaved, conjugate) for t in (q, k))
    return (q, k) if norm_first else qk_norm(q, k, q_weight, k_weight, eps)


def swiglu(x):
    """silu(gate) * value, gate and value the halves of the last dimension."""
    gate, value = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * value


def mvsplit_rmsnorm(x, f, alpha, beta, weight=None, segments=None, eps=1e-5):
    """RMSNorm(x + beta * P f + alpha * J (f - x)), P = I - J."""
    segments = [x.shape[1]] if segments is None else list(segments)
    centred = f - token_mean(f, segments)
    z = x + beta * centred + alpha * token_mean(f - x, segments)
    return rms_norm(z, weight, eps).to(x.dtype)


def mvsplit_rmsnorm_with_mean(x, f, alpha, beta, weight=None, jx=None, segments=None, eps=1e-5):
    """mvsplit_rmsnorm and the segment means of its result; jx is a function of x in any case."""
    segments = [x.shape[1]] if segments is None else list(segments)
    y = mvsplit_rmsnorm(x, f, alpha, beta, weight, segments, eps)
    return y, segment_means(y.detach(), segments)


def residual_rmsnorm(x, f, scale=None, weight=None, eps=1e-5):
    """RMSNorm(x + scale * f); a scale of None is 1."""
    z = x + (f if scale is None else scale * f)
    return rms_norm(z, weight, eps).to(x.dtype)
