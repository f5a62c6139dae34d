"""SwiGLU of a packed projection."""

import torch

from mvsplit_ops import _check, reference
from mvsplit_ops._register import Op, expose, register


def _check_inputs(x):
    if not isinstance(x, torch.Tensor) or x.dtype not in _check.ACTIVATIONS or x.dim() < 1:
        _check.fail("swiglu", "x", "a floating-point tensor (.., 2F)", _check.describe(x))
    if x.shape[-1] % 2:
        _check.fail("swiglu", "2F, the last dimension of x,", "even", x.shape[-1])


def _fake_fwd(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _save(ctx, x, outputs):
    ctx.save_for_backward(x)


def _backward(ctx, bwd, dy):
    return (bwd(dy, *ctx.saved_tensors),)


_OP = register(
    Op(
        name="swiglu",
        fwd="(Tensor x, str backend) -> Tensor",
        bwd="(Tensor dy, Tensor x, str backend) -> Tensor",
        results=1,
        activations=1,
        reference=reference.swiglu,
        check=_check_inputs,
        fake_fwd=_fake_fwd,
        fake_bwd=lambda dy, x: x.new_empty(x.shape),
        save=_save,
        backward=_backward,
    )
)


def swiglu(x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """silu(gate) * value with x = [gate, value] packed in the last dimension.

    x        (.., 2F)   fp32, bf16, fp16, fp64; gate first; any row stride
    returns  (.., F)    dtype of x, contiguous

    fp32 arithmetic (fp64 for fp64). Nothing is saved but x; backward writes a packed gradient.
    ValueError: shape, dtype. RuntimeError: the backend cannot run here.
    Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
    """
    return _OP(x, backend=backend)


expose(
    swiglu,
    "(Tensor x, *, str? backend=None) -> Tensor",
)
