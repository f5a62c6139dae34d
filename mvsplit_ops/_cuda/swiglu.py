"""Launchers of csrc/cuda/swiglu.cu."""

from collections.abc import Sequence

from torch import Tensor

from mvsplit_ops._cuda.common import choose_vector, make_program, new_empty
from mvsplit_ops._cuda.device import device_of
from mvsplit_ops._cuda.launch import Launch
from mvsplit_ops._host import ceil_div, require, row_stride, to_strided_rows

SWIGLU_THREADS, SWIGLU_ITEMS = 256, 2  # as in swiglu.cu


def swiglu_fwd(x: Tensor, up: Tensor | None, gate_first: bool) -> Tensor:
    F = x.shape[-1] // 2 if up is None else x.shape[-1]
    inputs = [to_strided_rows(t) for t in ([x] if up is None else [x, up])]
    y = new_empty(x, (*x.shape[:-1], F))
    _launch("swiglu_fwd", inputs, None, [y], gate_first, y)
    return y


def swiglu_bwd(dy: Tensor, x: Tensor, up: Tensor | None, gate_first: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of up; that of up is empty for a packed x."""
    F = x.shape[-1] // 2 if up is None else x.shape[-1]
    require("dy", dy, (*x.shape[:-1], F), x.dtype)
    if up is not None:
        require("up", up, x.shape, x.dtype)
    inputs = [to_strided_rows(t) for t in ([x] if up is None else [x, up])]
    dy = to_strided_rows(dy)
    grads = [new_empty(t, t.shape) for t in inputs]
    _launch("swiglu_bwd", inputs, dy, grads, gate_first, dy)
    return grads[0], new_empty(x, 0) if up is None else grads[1]


def _launch(
    kernel: str,
    inputs: Sequence[Tensor],
    dy: Tensor | None,
    outputs: Sequence[Tensor],
    gate_first: bool,
    result: Tensor,
) -> None:
    """Launch a kernel on one packed input and output, or on two; `result` has the shape of y."""
    if result.numel() == 0:
        return
    F = result.shape[-1]
    offsets = (0, 0) if len(inputs) == 2 else (0, F) if gate_first else (F, 0)
    gate, value, y, dvalue = inputs[0], inputs[-1], outputs[0], outputs[-1]
    strides = [0 if t is None else row_stride(t) or 0 for t in (gate, value, dy, y)]
    width = choose_vector((gate, value, dy, y, dvalue), F, *strides)
    total = result.numel() // width
    device_of(gate).launch(
        make_program("swiglu", gate.dtype, VEC=width),
        Launch(kernel, ceil_div(total, SWIGLU_THREADS * SWIGLU_ITEMS), SWIGLU_THREADS),
        (gate, value, dy, y, dvalue, *offsets, *strides, total, F),
    )
