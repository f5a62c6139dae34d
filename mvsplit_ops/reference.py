"""The definition of every operator in eager PyTorch, short enough to compare with the paper by eye.

Autograd differentiates these functions. With float64 inputs they give the exact result with which
every kernel is compared. fp16 and bf16 inputs are computed in fp32; results and gradients are
rounded once, a result to the dtype of the activations, whatever dtype the parameters have.

B batch, T tokens, D width, H heads, Dh head width, F SwiGLU width, S segments.
X_l `x`, F_l `f`, X_{l+1} `y`, J X `jx`, J F `jf`, alpha `alpha`, beta `beta`, pre-norm sum `z`,
1/rms `rstd`; a gradient is `d` and the name. arXiv 2605.06169.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Formula = TypeVar("Formula", bound=Callable[..., Any])


def widen(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t in the dtype of the arithmetic."""
    return t.to(dtype)


def rounded_once(formula: Formula) -> Formula:
    """Compute a formula in float32, or float64 for float64, and round its results once.

    Results have the dtype of the first argument. A formula that calls another definition passes
    float32 and receives float32: nothing is rounded in between.
    """
    first = next(iter(inspect.signature(formula).parameters))

    @functools.wraps(formula)
    def definition(*args: Any, **kwargs: Any) -> Any:
        stored = (args[0] if args else kwargs[first]).dtype
        dtype = torch.promote_types(stored, torch.float32)
        wide = [widen(t, dtype) if isinstance(t, Tensor) else t for t in args]
        named = {k: widen(t, dtype) if isinstance(t, Tensor) else t for k, t in kwargs.items()}
        results = formula(*wide, **named)
        if isinstance(results, tuple):
            return tuple(t.to(stored) for t in results)
        return results.to(stored)

    return cast("Formula", definition)


@rounded_once
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension; no weight is 1."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def token_mean(t: Tensor, segments: Sequence[int]) -> Tensor:
    """Return J t: the token mean of each segment of t (B, T, D), broadcast over its tokens."""
    parts = t.split(segments, dim=1)
    return torch.cat([p.mean(1, keepdim=True).expand_as(p) for p in parts], dim=1)


def segment_means(t: Tensor, segments: Sequence[int]) -> Tensor:
    """Return the token means of the segments of t, (B, S, D), in the dtype of accumulators."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    return torch.stack([p.mean(1) for p in t.split(segments, dim=1)], dim=1)


@rounded_once
def rope(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, conjugate: bool = False
) -> Tensor:
    """Rotate the pair (x1, x2) by theta: o1 = x1 cos - x2 sin, o2 = x2 cos + x1 sin."""
    cos, sin = (t[..., : x.shape[1], :].unsqueeze(-2) for t in (cos, sin))  # (.., T, 1, Dh/2)
    if conjugate:
        sin = -sin
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
    o1, o2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return torch.stack((o1, o2), -1).flatten(-2) if interleaved else torch.cat((o1, o2), -1)


@rounded_once
def qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return the RMSNorm over Dh of each head of q and of k."""
    return rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)


@rounded_once
def rope_qk_norm(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    conjugate: bool = False,
    norm_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return qk_norm(rope(q), rope(k)); with norm_first, rope of the normalised q and k."""
    if norm_first:
        q, k = qk_norm(q, k, q_weight, k_weight, eps)
    q, k = (rope(t, cos, sin, interleaved, conjugate) for t in (q, k))
    return (q, k) if norm_first else qk_norm(q, k, q_weight, k_weight, eps)


@rounded_once
def swiglu(x: Tensor, up: Tensor | None = None, gate_first: bool = True) -> Tensor:
    """Return silu(gate) * up: of the halves of x, or of x, the gate, and up."""
    halves = x.chunk(2, -1) if up is None else (x, up)
    gate, up = halves if gate_first else reversed(halves)
    return torch.nn.functional.silu(gate) * up


@rounded_once
def mvsplit_rmsnorm(
    x: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None = None,
    segments: Sequence[int] | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return RMSNorm(x + beta * P f + alpha * J (f - x)), P = I - J."""
    segments = [x.shape[1]] if segments is None else list(segments)
    centred = f - token_mean(f, segments)
    z = x + beta * centred + alpha * token_mean(f - x, segments)
    return rms_norm(z, weight, eps)


def mvsplit_rmsnorm_with_mean(
    x: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None = None,
    jx: Tensor | None = None,
    segments: Sequence[int] | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return mvsplit_rmsnorm and the segment means of its result; jx is computed from x anyway."""
    segments = [x.shape[1]] if segments is None else list(segments)
    y = mvsplit_rmsnorm(x, f, alpha, beta, weight, segments, eps)
    return y, segment_means(y.detach(), segments)


@rounded_once
def residual_rmsnorm(
    x: Tensor,
    f: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return RMSNorm(x + scale * f); no scale is 1."""
    z = x + (f if scale is None else scale * f)
    return rms_norm(z, weight, eps)
