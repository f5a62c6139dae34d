"""The plain residual with RMSNorm: Post-Norm, LayerScale, ReZero."""

import torch

from mvsplit_ops import _check, reference
from mvsplit_ops._host import accumulator
from mvsplit_ops._register import Op, expose, register

_NAME = "residual_rmsnorm"


def _check_inputs(x, f, scale, weight, eps):
    _check.merge(_NAME, x, f)
    _check.parameter(_NAME, "scale", scale, x.shape[2], x)
    _check.parameter(_NAME, "weight", weight, x.shape[2], x)


def _fake_fwd(x, f, scale, weight, eps):
    rstd = x.new_empty(x.shape[:2], dtype=accumulator(x.dtype))
    return x.new_empty(x.shape), rstd


def _fake_bwd(dy, kept, f, scale, weight, rstd):
    acc, D = accumulator(dy.dtype), dy.shape[2]
    params = (dy.new_empty(0 if p is None else D, dtype=acc) for p in (scale, weight))
    return dy.new_empty(dy.shape), dy.new_empty(0 if scale is None else dy.shape), *params


def _save(ctx, x, f, scale, weight, eps, outputs):
    y, rstd = outputs
    if scale is None and weight is None:
        ctx.save_for_backward(y, None, None, None, rstd)
    else:  # f is read for dscale in any case; x beside it costs no more than y
        ctx.save_for_backward(x, f, scale, weight, rstd)


def _backward(ctx, bwd, dy):
    saved = ctx.saved_tensors  # read once: checkpointing recomputes them for one reading
    _, _, scale, weight, _ = saved
    dx, df, dscale, dweight = bwd(dy, *saved)
    df, dscale = (dx, None) if scale is None else (df, dscale)  # df = scale * dx
    return dx, df, dscale, None if weight is None else dweight, None


_OP = register(
    Op(
        name=_NAME,
        fwd="(Tensor x, Tensor f, Tensor? scale, Tensor? weight, float eps, str backend) "
        "-> (Tensor, Tensor)",
        bwd="(Tensor dy, Tensor kept, Tensor? f, Tensor? scale, Tensor? weight, Tensor rstd, "
        "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
        results=1,
        activations=2,
        reference=reference.residual_rmsnorm,
        check=_check_inputs,
        fake_fwd=_fake_fwd,
        fake_bwd=_fake_bwd,
        save=_save,
        backward=_backward,
    )
)


def residual_rmsnorm(
    x: torch.Tensor,
    f: torch.Tensor,
    scale: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> torch.Tensor:
    """RMSNorm(x + scale * f): Post-Norm (scale None), LayerScale ((D,)), ReZero (a scalar).

    x, f     (B, T, D)    fp32, bf16, fp16, fp64   trunk and branch
    scale    (D,) or ()   fp32 or dtype of x       gain of the branch; None: 1
    weight   (D,)         fp32 or dtype of x       RMSNorm weight; optional
    returns  (B, T, D)    dtype of x               the next trunk

    Moves 2 reads and 1 write forward; backward 2 and 1 for a plain residual (dy and y), 3 and 2
    with a scale (dy, x and f). fp32 accumulation (fp64 for fp64), bit-identical from run to run.
    ValueError: shape, dtype, device. RuntimeError: the backend cannot run here.
    LayerScale: arXiv 2103.17239. ReZero: arXiv 2003.04887.
    """
    is_scalar = isinstance(scale, torch.Tensor) and scale.dim() == 0
    if is_scalar and isinstance(x, torch.Tensor) and x.dim() == 3:
        scale = scale.expand(x.shape[2])  # autograd sums the gradient back to the scalar
    return _OP(x, f, scale, weight, eps, backend=backend)


expose(
    residual_rmsnorm,
    "(Tensor x, Tensor f, Tensor? scale=None, Tensor? weight=None, *, "
    "float eps=1e-5, str? backend=None) -> Tensor",
)
