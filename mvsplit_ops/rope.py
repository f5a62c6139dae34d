"""Rotary position embedding."""

from torch import Tensor

from mvsplit_ops import reference
from mvsplit_ops._check import check_activation, check_tables
from mvsplit_ops._register import Context, Gradients, Kernel, Op, expose, register
from mvsplit_ops._tables import to_half_width


def _check_inputs(x: Tensor, cos: Tensor, sin: Tensor, *_: bool) -> None:
    check_activation("rope", "x", x, "B T H Dh")
    check_tables("rope", cos, sin, x)


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _save(
    ctx: Context,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    conjugate: bool,
    outputs: tuple[Tensor, ...],
) -> None:
    require_constant_tables("rope", ctx, 1)
    ctx.save_for_backward(cos, sin)
    ctx.modes = interleaved, conjugate


def _backward(ctx: Context, bwd: Kernel, dy: Tensor) -> Gradients:
    return bwd(dy, *ctx.saved_tensors, *ctx.modes), None, None, None, None


def require_constant_tables(op: str, ctx: Context, first: int) -> None:
    """Raise ValueError if cos or sin, arguments `first` and the next, require a gradient."""
    if any(ctx.needs_input_grad[first : first + 2]):
        raise ValueError(
            f"{op}: cos and sin must not require grad, because no kernel computes it; "
            "detach them, or pass backend='reference'"
        )


_OP = register(
    Op(
        name="rope",
        fwd="(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool conjugate, "
        "str backend) -> Tensor",
        bwd="(Tensor dy, Tensor cos, Tensor sin, bool interleaved, bool conjugate, "
        "str backend) -> Tensor",
        results=1,
        activations=1,
        reference=reference.rope,
        check=_check_inputs,
        fake_fwd=_fake,
        fake_bwd=_fake,
        save=_save,
        backward=_backward,
    )
)


@expose(
    "(Tensor x, Tensor cos, Tensor? sin=None, *, bool interleaved=False, "
    "bool conjugate=False, str? backend=None) -> Tensor"
)
def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor | None = None,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Rotate each pair of x by its angle: o1 = x1 cos - x2 sin, o2 = x2 cos + x1 sin.

        q = mv.rope(q, theta.cos(), theta.sin())  # theta (T, Dh/2) in radians
        q = mv.rope(q, torch.polar(torch.ones_like(theta), theta))  # one complex table

    x            (B, T, H, Dh)   fp32, bf16, fp16, fp64; Dh even; any row stride
    cos, sin     (T, Dh/2), (1, T, Dh/2) or (B, T, Dh/2); constants; rows after T are unused
                 or width Dh, each angle twice: two equal halves, or pairs of equal neighbours
                 or one complex table as cos, and no sin
                 any floating-point dtype and any strides, read in place without a copy
    interleaved  bool            pairs (2i, 2i + 1) instead of (i, i + Dh/2)
    conjugate    bool            rotate by -theta
    returns      (B, T, H, Dh)   dtype of x, contiguous

    fp32 arithmetic (fp64 for fp64). The gradient is the rotation by -theta. The values of a table
    of width Dh are checked at its first use, which waits for a GPU; torch.compile checks in the
    graph.
    ValueError: shape, dtype, device, or a table that requires grad. RuntimeError: the backend
    cannot run here, or the derivative has no kernel (forward mode, second derivatives;
    backend='reference' has them).
    Su et al., RoFormer, arXiv 2104.09864.
    """
    cos, sin = to_half_width("rope", cos, sin, x, interleaved)
    return _OP(x, cos, sin, interleaved, conjugate, backend=backend)
