"""Launchers of csrc/cuda/swiglu.cu."""

from mvsplit_ops._cuda.common import ceil_div, new, program, vector
from mvsplit_ops._cuda.device import device_of
from mvsplit_ops._cuda.launch import Launch
from mvsplit_ops._host import require, row_stride, rows

THREADS, ITEMS = 256, 2  # as in swiglu.cu


def swiglu_fwd(x):
    x = rows(x)
    y = new(x, (*x.shape[:-1], x.shape[-1] // 2))
    _launch("swiglu_fwd", y.numel(), y.shape[-1], x, None, y)
    return y


def swiglu_bwd(dy, x):
    require("dy", dy, (*x.shape[:-1], x.shape[-1] // 2), x.dtype)
    x, dy = rows(x), rows(dy)
    dx = new(x, x.shape)
    _launch("swiglu_bwd", dy.numel(), dy.shape[-1], x, dy, dx)
    return dx


def _launch(kernel, results, F, x, dy, out):
    if results == 0:
        return
    strides = [0 if t is None else row_stride(t) for t in (x, dy, out)]
    width = vector((x, dy, out), F, *strides)
    total = results // width
    device_of(x).launch(
        program("swiglu", x.dtype, VEC=width),
        Launch(kernel, ceil_div(total, THREADS * ITEMS), THREADS),
        (x, dy, out, total, F, *strides),
    )
