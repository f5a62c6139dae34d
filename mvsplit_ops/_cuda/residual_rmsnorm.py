"""Launchers of csrc/cuda/residual_rmsnorm.cu."""

from mvsplit_ops._cuda import rows
from mvsplit_ops._cuda.common import (
    ceil_div,
    new,
    new_statistics,
    parameter,
    program,
    sum_rows,
    vector,
)
from mvsplit_ops._cuda.device import device_of
from mvsplit_ops._cuda.launch import Launch
from mvsplit_ops._host import dense, require_residual


def residual_rmsnorm_fwd(x, f, scale, weight, eps):
    x, f, scale, weight = dense(x, f, scale, weight)
    y, rstd = new(x, x.shape), new_statistics(x, *x.shape[:2])
    call = _Call("forward", (x, f, y), f, scale, weight, rstd)
    call.launch("residual_fwd", (x, f, y, None, None, None, rstd, None, None), eps)
    return y, rstd


def residual_rmsnorm_bwd(dy, kept, f, scale, weight, rstd):
    require_residual(dy, kept, f, scale, weight, rstd)
    dy, kept, f, rstd, scale, weight = dense(dy, kept, f, rstd, scale, weight)
    dx, df = new(dy, dy.shape), new(dy, 0 if scale is None else dy.shape)
    call = _Call("backward", (dy, kept, f, dx, df), f, scale, weight, rstd)
    given = [p is not None for p in (scale, weight)]
    partials = new_statistics(dy, sum(given), call.blocks, call.D)
    planes = iter(partials)
    dscale, dweight = (next(planes) if g else None for g in given)
    tensors = kept, f, None, dy, dx, df if given[0] else None, rstd, dscale, dweight
    call.launch("residual_bwd", tensors, 0.0, sums=any(given))
    sums = iter(sum_rows(partials, call.program) if any(given) else ())
    return dx, df, *(next(sums) if g else new_statistics(dy, 0) for g in given)


class _Call:
    """Layout and program of one call."""

    def __init__(self, direction, tensors, f, scale, weight, rstd):
        self.parameters, self.first = (scale, weight), tensors[0]
        self.device = device_of(self.first)
        B, T, self.D = self.first.shape
        self.N, self.accumulator = B * T, rstd.element_size()
        width = vector((*tensors, scale, weight), self.D)
        self.rows = rows.layout(direction, self.D, self.accumulator, width)
        self.share = rows.rows_per_block(direction, self.N)
        self.blocks = ceil_div(self.N, self.share)
        flags = {"SCALE": scale is not None, "WEIGHT": weight is not None, "BRANCH": f is not None}
        flags = {name: int(flag) for name, flag in flags.items()}
        self.program = program("residual_rmsnorm", self.first.dtype, **self.rows.defines, **flags)

    def launch(self, kernel, tensors, eps, sums=False):
        vectors = sum(p is not None for p in self.parameters)
        shared = self.rows.shared(self.D, self.accumulator, vectors, sums)
        rows.require_shared("residual_rmsnorm", self.D, shared, self.device.limits)
        scale, weight = map(parameter, self.parameters)
        self.device.launch(
            self.program,
            Launch(kernel, self.blocks, self.rows.threads, shared=shared),
            (*tensors, *scale, *weight, self.N, self.D, self.share, eps),
        )
