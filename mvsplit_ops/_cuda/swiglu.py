"""Launchers of csrc/cuda/swiglu.cu."""

from torch import Tensor

from mvsplit_ops._cuda.common import choose_vector, make_program, new_empty
from mvsplit_ops._cuda.device import device_of
from mvsplit_ops._cuda.launch import Launch
from mvsplit_ops._host import ceil_div, require, row_stride, to_strided_rows

SWIGLU_THREADS, SWIGLU_ITEMS = 256, 2  # as in swiglu.cu


def swiglu_fwd(x: Tensor, up: Tensor | None, gate_first: bool) -> Tensor:
    if up is not None or not gate_first:
        raise NotImplementedError("swiglu of two tensors")
    x = to_strided_rows(x)
    y = new_empty(x, (*x.shape[:-1], x.shape[-1] // 2))
    _launch("swiglu_fwd", y.numel(), y.shape[-1], x, None, y)
    return y


def swiglu_bwd(
    dy: Tensor, x: Tensor, up: Tensor | None, gate_first: bool
) -> tuple[Tensor, Tensor]:
    if up is not None or not gate_first:
        raise NotImplementedError("swiglu of two tensors")
    require("dy", dy, (*x.shape[:-1], x.shape[-1] // 2), x.dtype)
    x, dy = to_strided_rows(x), to_strided_rows(dy)
    dx = new_empty(x, x.shape)
    _launch("swiglu_bwd", dy.numel(), dy.shape[-1], x, dy, dx)
    return dx, new_empty(x, 0)


def _launch(kernel: str, results: int, F: int, x: Tensor, dy: Tensor | None, out: Tensor) -> None:
    if results == 0:
        return
    strides = [0 if t is None else row_stride(t) or 0 for t in (x, dy, out)]
    width = choose_vector((x, dy, out), F, *strides)
    total = results // width
    device_of(x).launch(
        make_program("swiglu", x.dtype, VEC=width),
        Launch(kernel, ceil_div(total, SWIGLU_THREADS * SWIGLU_ITEMS), SWIGLU_THREADS),
        (x, dy, out, total, F, *strides),
    )
