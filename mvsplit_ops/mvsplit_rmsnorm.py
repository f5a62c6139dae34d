"""The Mean-Variance Split residual with RMSNorm."""

from collections.abc import Sequence

from torch import Tensor

from mvsplit_ops import reference
from mvsplit_ops._check import (
    check_merge_inputs,
    check_parameter,
    check_segments,
    check_statistic,
    to_eps,
    to_token_counts,
)
from mvsplit_ops._host import accumulator_dtype
from mvsplit_ops._register import Context, Gradients, Kernel, Op, expose, register

_NAME = "mvsplit_rmsnorm"


def _check_inputs(
    x: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    jx: Tensor | None,
    segments: list[int],
    *_: object,
) -> None:
    check_merge_inputs(_NAME, x, f)
    for arg, t in (("alpha", alpha), ("beta", beta), ("weight", weight)):
        check_parameter(_NAME, arg, t, x.shape[2], x)
    check_segments(_NAME, segments, x.shape[1])
    check_statistic(_NAME, "jx", jx, (x.shape[0], len(segments), x.shape[2]), x)


def _reference(
    x: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    jx: Tensor | None,
    segments: list[int],
    eps: float,
    carry: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    if carry:
        return reference.mvsplit_rmsnorm_with_mean(x, f, alpha, beta, weight, jx, segments, eps)
    return reference.mvsplit_rmsnorm(x, f, alpha, beta, weight, segments, eps)


def _fake_fwd(
    x: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    jx: Tensor | None,
    segments: list[int],
    eps: float,
    carry: bool,
) -> tuple[Tensor, ...]:
    dtype = accumulator_dtype(x.dtype)
    means = (x.shape[0], len(segments), x.shape[2])
    new_jy, new_jx, jf = (
        x.new_empty(means if exists else 0, dtype=dtype) for exists in (carry, jx is None, True)
    )
    return x.new_empty(x.shape), new_jy, x.new_empty(x.shape[:2], dtype=dtype), new_jx, jf


def _fake_bwd(
    dy: Tensor,
    saved: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    *_: object,
) -> tuple[Tensor, ...]:
    dtype, D = accumulator_dtype(dy.dtype), dy.shape[2]
    params = (dy.new_empty(n, dtype=dtype) for n in (D, D, 0 if weight is None else D))
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape), *params


def _save(
    ctx: Context,
    x: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    jx: Tensor | None,
    segments: list[int],
    eps: float,
    carry: bool,
    outputs: tuple[Tensor, ...],
) -> None:
    y, _, rstd, new_jx, jf = outputs
    saved = y if weight is None else x
    jx = new_jx if jx is None else jx
    ctx.save_for_backward(saved, f, alpha, beta, weight, rstd, jx, jf)
    ctx.segments = segments


def _backward(ctx: Context, bwd: Kernel, dy: Tensor) -> Gradients:
    saved = ctx.saved_tensors  # read once: checkpointing recomputes them at each reading
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


@expose(
    "(Tensor x, Tensor f, Tensor alpha, Tensor beta, Tensor? weight=None, *, "
    "SymInt[]? segments=None, float eps=1e-5, str? backend=None) -> Tensor"
)
def mvsplit_rmsnorm(
    x: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None = None,
    *,
    segments: Sequence[int] | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Return RMSNorm(x + beta * P f + alpha * J (f - x)): J averages a segment's tokens, P = I - J.

        y = mv.mvsplit_rmsnorm(x, f, alpha, beta, segments=(256, 64))

    x, f         (B, T, D)   fp32, bf16, fp16, fp64   X_l, the residual stream; F_l, the branch
    alpha, beta  (D,)        fp32 or dtype of x       gains of the mean and of the centred part
    weight       (D,)        fp32 or dtype of x       RMSNorm weight; optional, the paper uses none
    segments     ints        token counts that sum to T, e.g. of image and text; None: one segment;
                             at most 64 integers of any type: int, numpy, symbolic, 0-d tensors
    returns      (B, T, D)   dtype of x               X_{l+1}

    Moves 2 reads and 1 write forward, 3 and 2 backward. Backward reads dy, y and f; with a weight,
    x instead of y. fp32 accumulation (fp64 for fp64), bit-identical from run to run.
    ValueError: shape, dtype, device, segments. RuntimeError: the backend cannot run here, or the
    derivative has no kernel (forward mode, second derivatives; backend='reference' has them).
    arXiv 2605.06169, Sec. 5; segments: App. E.
    """
    inputs = x, f, alpha, beta, weight, None, _to_counts(x, segments), to_eps(_NAME, eps), False
    return _OP(*inputs, backend=backend)


@expose(
    "(Tensor x, Tensor f, Tensor alpha, Tensor beta, Tensor? weight=None, *, Tensor? jx=None, "
    "SymInt[]? segments=None, float eps=1e-5, str? backend=None) -> (Tensor, Tensor)"
)
def mvsplit_rmsnorm_with_mean(
    x: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None = None,
    *,
    jx: Tensor | None = None,
    segments: Sequence[int] | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return mvsplit_rmsnorm and the segment means of its result, which save the next merge a pass.

        y, jy = mv.mvsplit_rmsnorm_with_mean(x, f, alpha, beta)
        y, jy = mv.mvsplit_rmsnorm_with_mean(y, f2, alpha2, beta2, jx=jy)

    jx       (B, S, D)      fp32 (fp64 for fp64)   J X_l, e.g. jy of the previous merge; optional
    returns  y, (B, T, D)   dtype of x             X_{l+1}
             jy, (B, S, D)  fp32 (fp64 for fp64)   J X_{l+1}, the means of y as it is stored

    The other arguments, the precision and the errors are those of mvsplit_rmsnorm. jx saves a read
    of x. It must be the mean of x, which is not checked. The gradients are those of
    mvsplit_rmsnorm, in which jx is a function of x; jx and jy have none.
    """
    inputs = x, f, alpha, beta, weight, jx, _to_counts(x, segments), to_eps(_NAME, eps), True
    return _OP(*inputs, backend=backend, outputs=2)


def _to_counts(x: Tensor, segments: Sequence[int] | None) -> list[int]:
    if segments is None and isinstance(x, Tensor) and x.dim() == 3:
        segments = [] if x.is_nested else [x.shape[1]]
    return to_token_counts(_NAME, segments)
