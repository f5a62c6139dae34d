"""The Mean-Variance Split residual with RMSNorm."""

from collections.abc import Sequence

import torch

from mvsplit_ops import _check, reference
from mvsplit_ops._register import Op, expose, register

_NAME = "mvsplit_rmsnorm"


def _check_inputs(x, f, alpha, beta, weight, segments, eps):
    _check.merge(_NAME, x, f)
    for arg, t in (("alpha", alpha), ("beta", beta), ("weight", weight)):
        _check.parameter(_NAME, arg, t, x.shape[2], x)
    _check.segments(_NAME, segments, x.shape[1])


def _fake_fwd(x, f, alpha, beta, weight, segments, eps):
    acc = _check.accumulator(x.dtype)
    mean_shape = (x.shape[0], len(segments), x.shape[2])
    jx, jf = (x.new_empty(mean_shape, dtype=acc) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=acc), jx, jf


def _fake_bwd(dy, kept, f, alpha, beta, weight, rstd, jx, jf, segments):
    acc, D = _check.accumulator(dy.dtype), dy.shape[2]
    params = (dy.new_empty(n, dtype=acc) for n in (D, D, 0 if weight is None else D))
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape), *params


def _save(ctx, x, f, alpha, beta, weight, segments, eps, outputs):
    y, rstd, jx, jf = outputs
    kept = y if weight is None else x
    ctx.save_for_backward(kept, f, alpha, beta, weight, rstd, jx, jf)
    ctx.segments = segments


def _backward(ctx, bwd, dy):
    saved = ctx.saved_tensors  # read once: checkpointing recomputes them for one reading
    weight = saved[4]
    dx, df, dalpha, dbeta, dweight = bwd(dy, *saved, ctx.segments)
    return dx, df, dalpha, dbeta, None if weight is None else dweight, None, None


_OP = register(
    Op(
        name=_NAME,
        public="(Tensor x, Tensor f, Tensor alpha, Tensor beta, Tensor? weight=None, *, "
        "SymInt[]? segments=None, float eps=1e-5, str? backend=None) -> Tensor",
        fwd="(Tensor x, Tensor f, Tensor alpha, Tensor beta, Tensor? weight, SymInt[] segments, "
        "float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
        bwd="(Tensor dy, Tensor kept, Tensor f, Tensor alpha, Tensor beta, Tensor? weight, "
        "Tensor rstd, Tensor jx, Tensor jf, SymInt[] segments, str backend) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        results=1,
        activations=2,
        reference=reference.mvsplit_rmsnorm,
        check=_check_inputs,
        fake_fwd=_fake_fwd,
        fake_bwd=_fake_bwd,
        save=_save,
        backward=_backward,
    )
)


def mvsplit_rmsnorm(
    x: torch.Tensor,
    f: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    segments: Sequence[int] | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> torch.Tensor:
    """RMSNorm(x + beta * P f + alpha * J (f - x)), J the token mean of each segment, P = I - J.

    x, f         (B, T, D)   fp32, bf16, fp16, fp64   X_l, the trunk, and F_l, the branch
    alpha, beta  (D,)        fp32 or dtype of x       gains of the mean and of the centred part
    weight       (D,)        fp32 or dtype of x       RMSNorm weight; optional, the paper uses none
    segments     ints        token counts that sum to T, e.g. (256, 64) image and text; None: one
    returns      (B, T, D)   dtype of x               X_{l+1}

    Moves 2 reads and 1 write forward, 3 and 2 backward; backward needs y and f, not x (with a
    weight x and f, not y). fp32 accumulation (fp64 for fp64), bit-identical from run to run.
    ValueError: shape, dtype, device, segments. RuntimeError: the backend cannot run here.
    arXiv 2605.06169, Sec. 5; segments App. E.
    """
    if segments is None and isinstance(x, torch.Tensor) and x.dim() == 3:
        segments = [x.shape[1]]
    segments = _check.token_counts(_NAME, segments)
    return _OP(x, f, alpha, beta, weight, segments, eps, backend=backend)


expose(_OP, mvsplit_rmsnorm)
