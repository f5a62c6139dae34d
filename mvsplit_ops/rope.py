"""Rotary position embedding."""

import torch

from mvsplit_ops import _check, reference
from mvsplit_ops._register import Op, expose, register


def _check_inputs(x, cos, sin, interleaved, conjugate):
    _check.activation("rope", "x", x, "B T H Dh")
    _check.tables("rope", cos, sin, x)


def _fake(x, cos, sin, interleaved, conjugate):
    return x.new_empty(x.shape)


def _save(ctx, x, cos, sin, interleaved, conjugate, outputs):
    constant_tables("rope", ctx, 1)
    ctx.save_for_backward(cos, sin)
    ctx.flags = interleaved, conjugate


def _backward(ctx, bwd, dy):
    return bwd(dy, *ctx.saved_tensors, *ctx.flags), None, None, None, None


def constant_tables(op, ctx, first):
    """Raise if cos or sin, arguments first and first + 1, want a gradient: none is computed."""
    if any(ctx.needs_input_grad[first : first + 2]):
        raise ValueError(
            f"{op}: cos and sin must not require grad, no kernel computes it; "
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


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Rotate each pair of x by its angle: o1 = x1 cos - x2 sin, o2 = x2 cos + x1 sin.

    x            (B, T, H, Dh)               fp32, bf16, fp16, fp64; Dh even; any row stride
    cos, sin     (T, Dh/2) or (B, T, Dh/2)   fp32 or dtype of x; constants; longer ones are cut
    interleaved  bool                        pairs (2i, 2i+1) instead of (i, i + Dh/2)
    conjugate    bool                        rotate by the negative angle, the inverse
    returns      (B, T, H, Dh)               dtype of x, contiguous

    fp32 arithmetic (fp64 for fp64). The gradient is the inverse rotation.
    ValueError: shape, dtype, device. RuntimeError: the backend cannot run here.
    Su et al., RoFormer, arXiv 2104.09864.
    """
    return _OP(x, cos, sin, interleaved, conjugate, backend=backend)


expose(
    rope,
    "(Tensor x, Tensor cos, Tensor sin, *, bool interleaved=False, "
    "bool conjugate=False, str? backend=None) -> Tensor",
)
