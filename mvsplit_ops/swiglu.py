"""SwiGLU of a packed projection, or of two tensors."""

from torch import Tensor

from mvsplit_ops import reference
from mvsplit_ops._check import (
    ACTIVATIONS,
    check_dense,
    check_even_width,
    check_same_shape,
    fail,
)
from mvsplit_ops._host import describe, format_dtypes
from mvsplit_ops._register import Context, Gradients, Kernel, Op, expose, register

_NAME = "swiglu"


def _check_inputs(x: Tensor, up: Tensor | None, gate_first: bool) -> None:
    dims = "(.., 2F)" if up is None else "(.., F)"
    if not isinstance(x, Tensor) or x.dtype not in ACTIVATIONS or x.dim() < 1:
        fail(_NAME, "x", f"a floating-point tensor {dims}", describe(x))
    check_dense(_NAME, "x", x)
    if up is None:
        check_even_width(_NAME, "2F, the last dimension of x,", x)
        return
    if not gate_first:
        fail(_NAME, "gate_first", "True if up is passed: x is the gate", gate_first)
    if not isinstance(up, Tensor) or up.dtype != x.dtype:
        fail(_NAME, "up", f"{format_dtypes(x.dtype)} like x", describe(up))
    check_dense(_NAME, "up", up)
    check_same_shape(_NAME, "up", up, "x", x)
    if up.device != x.device:
        fail(_NAME, "up", f"on {x.device}, the device of the first input", up.device)


def _fake_fwd(x: Tensor, up: Tensor | None, gate_first: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2) if up is None else x.shape)


def _fake_bwd(dy: Tensor, x: Tensor, up: Tensor | None, gate_first: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if up is None else up.shape)


def _save(
    ctx: Context, x: Tensor, up: Tensor | None, gate_first: bool, outputs: tuple[Tensor, ...]
) -> None:
    ctx.save_for_backward(x, up)
    ctx.modes = (gate_first,)


def _backward(ctx: Context, bwd: Kernel, dy: Tensor) -> Gradients:
    x, up = ctx.saved_tensors
    dx, dup = bwd(dy, x, up, *ctx.modes)
    return dx, None if up is None else dup, None


_OP = register(
    Op(
        name=_NAME,
        fwd="(Tensor x, Tensor? up, bool gate_first, str backend) -> Tensor",
        bwd="(Tensor dy, Tensor x, Tensor? up, bool gate_first, str backend) -> (Tensor, Tensor)",
        results=1,
        activations=2,
        reference=reference.swiglu,
        check=_check_inputs,
        fake_fwd=_fake_fwd,
        fake_bwd=_fake_bwd,
        save=_save,
        backward=_backward,
        rowwise=True,
    )
)


@expose("(Tensor x, Tensor? up=None, *, bool gate_first=True, str? backend=None) -> Tensor")
def swiglu(
    x: Tensor,
    up: Tensor | None = None,
    *,
    gate_first: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Return silu(gate) * up, of one packed tensor or of two.

        h = mv.swiglu(x)                    # x = [gate, up], packed in the last dimension
        h = mv.swiglu(x, gate_first=False)  # x = [up, gate]
        h = mv.swiglu(gate, up)             # two projections

    x           (.., 2F)   fp32, bf16, fp16, fp64   packed; with up: the gate, (.., F)
    up          (.., F)    dtype of x               optional
    gate_first  bool       order of the halves of a packed x
    returns     (.., F)    dtype of x               contiguous

    Tensors may have any row stride, for example views of a wider projection; nothing is
    concatenated. Nested tensors of layout torch.jagged are accepted. fp32 arithmetic (fp64 for
    fp64). Backward keeps only the inputs, and writes a packed gradient for a packed x.
    ValueError: shape, dtype, device. RuntimeError: the backend cannot run here, or the derivative
    has no kernel (forward mode, second derivatives; backend='reference' has them).
    Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
    """
    return _OP(x, up, gate_first, backend=backend)
