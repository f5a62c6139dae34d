"""Launchers of csrc/cuda/residual_rmsnorm.cu."""

from collections.abc import Sequence

from torch import Tensor

from mvsplit_ops._cuda.common import (
    choose_vector,
    make_program,
    new_empty,
    new_statistics,
    sum_rows,
    to_parameter_fields,
)
from mvsplit_ops._cuda.device import device_of
from mvsplit_ops._cuda.launch import Argument, Launch
from mvsplit_ops._cuda.rows import lay_out_rows, require_shared, rows_per_block
from mvsplit_ops._host import ceil_div, require_residual, to_contiguous


def residual_rmsnorm_fwd(
    x: Tensor, f: Tensor, scale: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x, f = x.contiguous(), f.contiguous()
    scale, weight = to_contiguous(scale, weight)
    y, rstd = new_empty(x, x.shape), new_statistics(x, *x.shape[:2])
    call = _ResidualCall("forward", x, (f, y), f, scale, weight, rstd)
    call.launch("residual_fwd", (x, f, y, None, None, None, rstd, None, None), eps)
    return y, rstd


def residual_rmsnorm_bwd(
    dy: Tensor,
    saved: Tensor,
    f: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, ...]:
    require_residual(dy, saved, f, scale, weight, rstd)
    dy, saved, rstd = to_contiguous(dy, saved, rstd)
    f, scale, weight = to_contiguous(f, scale, weight)
    dx, df = new_empty(dy, dy.shape), new_empty(dy, 0 if scale is None else dy.shape)
    call = _ResidualCall("backward", dy, (saved, f, dx, df), f, scale, weight, rstd)
    present = [p is not None for p in (scale, weight)]
    partials = new_statistics(dy, sum(present), call.blocks, call.D)
    planes = iter(partials)
    dscale, dweight = (next(planes) if p else None for p in present)
    tensors = saved, f, None, dy, dx, df if present[0] else None, rstd, dscale, dweight
    call.launch("residual_bwd", tensors, 0.0, sums=any(present))
    sums = iter(sum_rows(partials, call.program) if any(present) else ())
    return dx, df, *(next(sums) if p else new_statistics(dy, 0) for p in present)


class _ResidualCall:
    """Layout and program of one call."""

    def __init__(
        self,
        direction: str,
        x: Tensor,
        others: tuple[Tensor | None, ...],
        f: Tensor | None,
        scale: Tensor | None,
        weight: Tensor | None,
        rstd: Tensor,
    ) -> None:
        self.parameters, self.device = (scale, weight), device_of(x)
        B, T, self.D = x.shape
        self.N, self.accumulator = B * T, rstd.element_size()
        width = choose_vector((x, *others, scale, weight), self.D)
        self.rows = lay_out_rows(direction, self.D, self.accumulator, width)
        summed = direction == "backward" and (scale is not None or weight is not None)
        self.share = rows_per_block(self.rows, self.N, summed)
        self.blocks = ceil_div(self.N, self.share)
        self.program = make_program(
            "residual_rmsnorm",
            x.dtype,
            **self.rows.defines,
            SCALE=int(scale is not None),
            WEIGHT=int(weight is not None),
            BRANCH=int(f is not None),
        )

    def launch(
        self, kernel: str, tensors: Sequence[Argument], eps: float, sums: bool = False
    ) -> None:
        vectors = sum(p is not None for p in self.parameters)
        shared = self.rows.count_shared(self.D, self.accumulator, vectors, sums)
        require_shared("residual_rmsnorm", self.D, shared, self.device.limits)
        scale, weight = map(to_parameter_fields, self.parameters)
        self.device.launch(
            self.program,
            Launch(kernel, self.blocks, self.rows.threads, shared=shared),
            (*tensors, *scale, *weight, self.N, self.D, self.share, eps),
        )
