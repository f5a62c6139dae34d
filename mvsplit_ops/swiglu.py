"""SwiGLU of a packed projection."""

from torch import Tensor

from mvsplit_ops import reference
from mvsplit_ops._check import ACTIVATIONS, describe, fail
from mvsplit_ops._register import Context, Gradients, Kernel, Op, expose, register


def _check_inputs(x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in ACTIVATIONS or x.dim() < 1:
        fail("swiglu", "x", "a floating-point tensor (.., 2F)", describe(x))
    if x.shape[-1] % 2:
        fail("swiglu", "2F, the last dimension of x,", "even", x.shape[-1])


def _fake_fwd(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _save(ctx: Context, x: Tensor, outputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(x)


def _backward(ctx: Context, bwd: Kernel, dy: Tensor) -> Gradients:
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


def swiglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Return silu(gate) * value, where x = [gate, value] is packed in the last dimension.

        h = mv.swiglu(torch.cat((gate, value), -1))

    x        (.., 2F)   fp32, bf16, fp16, fp64   gate first; any row stride
    returns  (.., F)    dtype of x               contiguous

    fp32 arithmetic (fp64 for fp64). Backward keeps only x, and writes a packed gradient.
    ValueError: shape, dtype. RuntimeError: the backend cannot run here.
    Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
    """
    return _OP(x, backend=backend)


expose(
    swiglu,
    "(Tensor x, *, str? backend=None) -> Tensor",
)
