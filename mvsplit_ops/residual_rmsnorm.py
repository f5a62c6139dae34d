"""The plain residual with RMSNorm: Post-Norm, LayerScale, ReZero."""

from torch import Tensor

from mvsplit_ops import reference
from mvsplit_ops._check import check_merge_inputs, check_parameter, to_eps
from mvsplit_ops._host import accumulator_dtype
from mvsplit_ops._register import Context, Gradients, Kernel, Op, expose, register

_NAME = "residual_rmsnorm"


def _check_inputs(
    x: Tensor, f: Tensor, scale: Tensor | None, weight: Tensor | None, eps: float
) -> None:
    check_merge_inputs(_NAME, x, f)
    check_parameter(_NAME, "scale", scale, x.shape[2], x)
    check_parameter(_NAME, "weight", weight, x.shape[2], x)


def _fake_fwd(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rstd = x.new_empty(x.shape[:2], dtype=accumulator_dtype(x.dtype))
    return x.new_empty(x.shape), rstd


def _fake_bwd(
    dy: Tensor,
    saved: Tensor,
    f: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, ...]:
    dtype, D = accumulator_dtype(dy.dtype), dy.shape[2]
    params = (dy.new_empty(0 if p is None else D, dtype=dtype) for p in (scale, weight))
    return dy.new_empty(dy.shape), dy.new_empty(0 if scale is None else dy.shape), *params


def _save(
    ctx: Context,
    x: Tensor,
    f: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    eps: float,
    outputs: tuple[Tensor, Tensor],
) -> None:
    y, rstd = outputs
    if scale is None and weight is None:
        ctx.save_for_backward(y, None, None, None, rstd)
    else:  # f is read for dscale in any case, and x costs no more than y
        ctx.save_for_backward(x, f, scale, weight, rstd)


def _backward(ctx: Context, bwd: Kernel, dy: Tensor) -> Gradients:
    saved = ctx.saved_tensors  # read once: checkpointing recomputes them at each reading
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
        rowwise=True,
    )
)


@expose(
    "(Tensor x, Tensor f, Tensor? scale=None, Tensor? weight=None, *, "
    "float eps=1e-5, str? backend=None) -> Tensor"
)
def residual_rmsnorm(
    x: Tensor,
    f: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Return RMSNorm(x + scale * f): Post-Norm (no scale), LayerScale ((D,)), ReZero (a scalar).

        y = mv.residual_rmsnorm(x, f, scale)

    x, f     (B, T, D)    fp32, bf16, fp16, fp64   X_l, the residual stream; F_l, the branch
    scale    (D,) or ()   fp32 or dtype of x       gain of the branch; None: 1
    weight   (D,)         fp32 or dtype of x       RMSNorm weight; optional
    returns  (B, T, D)    dtype of x               X_{l+1}

    Moves 2 reads and 1 write forward. Backward moves 2 and 1 without scale and weight (dy and y),
    3 and 2 with a scale (dy, x and f). fp32 accumulation (fp64 for fp64), bit-identical from run to
    run.
    Nested tensors of layout torch.jagged, (B, *, D), are accepted.
    ValueError: shape, dtype, device. RuntimeError: the backend cannot run here, or the derivative
    has no kernel (forward mode, second derivatives; backend='reference' has them).
    LayerScale: arXiv 2103.17239. ReZero: arXiv 2003.04887.
    """
    if isinstance(scale, Tensor) and scale.dim() == 0 and isinstance(x, Tensor) and x.dim() == 3:
        scale = scale.expand(x.shape[2])  # autograd sums the gradient back to the scalar
    return _OP(x, f, scale, weight, to_eps(_NAME, eps), backend=backend)
