"""The Mean-Variance Split residual with RMSNorm."""

from collections.abc import Sequence

import torch

from mvsplit_ops import _check, reference
from mvsplit_ops._host import accumulator
from mvsplit_ops._register import Op, expose, register

_NAME = "mvsplit_rmsnorm"


def _check_inputs(x, f, alpha, beta, weight, jx, segments, eps, carry):
    _check.merge(_NAME, x, f)
    for arg, t in (("alpha", alpha), ("beta", beta), ("weight", weight)):
        _check.parameter(_NAME, arg, t, x.shape[2], x)
    _check.segments(_NAME, segments, x.shape[1])
    _check.statistic(_NAME, "jx", jx, (x.shape[0], len(segments), x.shape[2]), x)


def _reference(x, f, alpha, beta, weight, jx, segments, eps, carry):
    if carry:
        return reference.mvsplit_rmsnorm_with_mean(x, f, alpha, beta, weight, jx, segments, eps)
    return reference.mvsplit_rmsnorm(x, f, alpha, beta, weight, segments, eps)


def _fake_fwd(x, f, alpha, beta, weight, jx, segments, eps, carry):
    acc = accumulator(x.dtype)
    means = (x.shape[0], len(segments), x.shape[2])
    new_jy, new_jx, jf = (
        x.new_empty(means if wanted else 0, dtype=acc) for wanted in (carry, jx is None, True)
    )
    return x.new_empty(x.shape), new_jy, x.new_empty(x.shape[:2], dtype=acc), new_jx, jf


def _fake_bwd(dy, kept, f, alpha, beta, weight, rstd, jx, jf, segments):
    acc, D = accumulator(dy.dtype), dy.shape[2]
    params = (dy.new_empty(n, dtype=acc) for n in (D, D, 0 if weight is None else D))
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape), *params


def _save(ctx, x, f, alpha, beta, weight, jx, segments, eps, carry, outputs):
    y, _, rstd, computed, jf = outputs
    kept = y if weight is None else x
    jx = computed if jx is None else jx
    ctx.save_for_backward(kept, f, alpha, beta, weight, rstd, jx, jf)
    ctx.segments = segments


def _backward(ctx, bwd, dy):
    saved = ctx.saved_tensors  # read once: checkpointing recomputes them for one reading
    weight = saved[4]
    dx, df, dalpha, dbeta, dweight = bwd(dy, *saved, ctx.segments)
    return dx, df, dalpha, dbeta, None if weight is None else dweight, *(None,) * 4


_OP = register(
    Op(
        name=_NAME,
        fwd="(Tensor x, Tensor f, Tensor alpha, Tensor beta, Tensor? weight, Tensor? jx, "
        "SymInt[] segments, float eps, bool carry, str backend) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        bwd="(Tensor dy, Tensor kept, Tensor f, Tensor alpha, Tensor beta, Tensor? weight, "
        "Tensor rstd, Tensor jx, Tensor jf, SymInt[] segments, str backend) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        results=1,
        activations=2,
        reference=_reference,
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
    inputs = x, f, alpha, beta, weight, None, _segments(x, segments), eps, False
    return _OP(*inputs, backend=backend)


def mvsplit_rmsnorm_with_mean(
    x: torch.Tensor,
    f: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    jx: torch.Tensor | None = None,
    segments: Sequence[int] | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """mvsplit_rmsnorm, and the segment means of its result: the next merge need not compute them.

        y, jy = mvsplit_rmsnorm_with_mean(x, f, alpha, beta)
        y, jy = mvsplit_rmsnorm_with_mean(y, f2, alpha2, beta2, jx=jy)

    jx       (B, S, D)   fp32 (fp64 for fp64)   segment means of x, e.g. the last merge's jy
    returns  y and jy (B, S, D), fp32 (fp64 for fp64), the segment means of y as stored

    The other arguments, precision and errors are mvsplit_rmsnorm's. jx is a hint that saves a read
    of x: it must be the mean of x, which is not checked; gradients are those of mvsplit_rmsnorm, in
    which jx is a function of x, and jy has none.
    """
    inputs = x, f, alpha, beta, weight, jx, _segments(x, segments), eps, True
    return _OP(*inputs, backend=backend, outputs=2)


def _segments(x, segments):
    if segments is None and isinstance(x, torch.Tensor) and x.dim() == 3:
        segments = [x.shape[1]]
    return _check.token_counts(_NAME, segments)


expose(
    mvsplit_rmsnorm,
    "(Tensor x, Tensor f, Tensor alpha, Tensor beta, Tensor? weight=None, *, "
    "SymInt[]? segments=None, float eps=1e-5, str? backend=None) -> Tensor",
)
expose(
    mvsplit_rmsnorm_with_mean,
    "(Tensor x, Tensor f, Tensor alpha, Tensor beta, Tensor? weight=None, *, Tensor? jx=None, "
    "SymInt[]? segments=None, float eps=1e-5, str? backend=None) -> (Tensor, Tensor)",
)
