"""Launchers of csrc/cuda/rope_qk_norm.cu: rope, qk_norm and rope_qk_norm are its modes."""

import functools
from collections.abc import Sequence

import torch
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
from mvsplit_ops._cuda.launch import Argument, Launch, Program
from mvsplit_ops._host import (
    MOST_PARTIALS,
    HeadLaunchers,
    HeadModes,
    Tables,
    TableStrides,
    ceil_div,
    next_power_of_two,
    require_heads,
    table_strides,
    to_contiguous,
    to_unit_stride,
)

HEADS_THREADS = 128  # as in rope_qk_norm.cu
TABLE_CODES = {  # as in rope_qk_norm.cu
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
}
# Most terms that a thread adds to the gradient of a weight one after another; LONG kernels add
# runs of them in double.
MOST_WEIGHT_TERMS = 32


def _forward(
    xs: list[Tensor],
    weights: list[Tensor | None],
    tables: Tables,
    eps: float,
    modes: HeadModes,
    norm: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the results and rstds of x, or of q and k; no rstd without a norm."""
    xs, weights = [to_unit_stride(x) for x in xs], to_contiguous(*weights)
    ys = [new_empty(x, x.shape) for x in xs]
    rstds = [new_statistics(x, *x.shape[:3]) for x in xs] if norm else []
    plan = _HeadsPlan(xs, [], ys, weights, tables, modes, norm)
    parts = zip(xs, ys, rstds if norm else [None], weights, strict=True)
    sides = [_to_side_fields(x, None, y, rstd, None, w) for x, y, rstd, w in parts]
    plan.launch("heads_fwd", sides, plan.groups, eps)
    return ys, rstds


def _backward(
    dys: list[Tensor],
    saved: list[Tensor],
    rstds: list[Tensor],
    weights: list[Tensor | None],
    tables: Tables,
    modes: HeadModes,
) -> tuple[Tensor, ...]:
    """Return dq, dk, dq_weight, dk_weight; the last two are empty without a weight."""
    require_heads(dys, saved, rstds, weights)
    dys, saved = [to_unit_stride(t) for t in dys], [to_unit_stride(t) for t in saved]
    rstds, weights = to_contiguous(*rstds), to_contiguous(*weights)
    dxs = [new_empty(x, x.shape) for x in saved]
    plan = _HeadsPlan(saved, dys, dxs, weights, tables, modes)
    weighted, width = sum(w is not None for w in weights), saved[0].shape[3]
    share = plan.groups * plan.tokens_per_thread
    partials = new_statistics(saved[0], weighted, ceil_div(plan.tokens, share), width)
    rows = iter(partials)
    dweights = [None if w is None else next(rows) for w in weights]
    sides = zip(saved, dys, dxs, rstds, dweights, weights, strict=True)
    shared = HEADS_THREADS // 32 * width * partials.element_size() if weighted else 0
    plan.launch("heads_bwd", [_to_side_fields(*side) for side in sides], share, 0.0, shared)
    sums = iter(sum_rows(partials, plan.program) if weighted else ())
    none = [new_statistics(saved[0], 0) for _ in weights]
    return *dxs, *(n if w is None else next(sums) for w, n in zip(weights, none, strict=True))


_LAUNCHERS = HeadLaunchers(_forward, _backward)
rope_fwd, rope_bwd = _LAUNCHERS.rope_fwd, _LAUNCHERS.rope_bwd
qk_norm_fwd, qk_norm_bwd = _LAUNCHERS.qk_norm_fwd, _LAUNCHERS.qk_norm_bwd
rope_qk_norm_fwd, rope_qk_norm_bwd = _LAUNCHERS.rope_qk_norm_fwd, _LAUNCHERS.rope_qk_norm_bwd


def _to_side_fields(
    x: Tensor,
    dy: Tensor | None,
    out: Tensor,
    rstd: Tensor | None,
    dweight: Tensor | None,
    weight: Tensor | None,
) -> tuple[Argument, ...]:
    """Return the fields of a kernel's `Side`."""
    dy_strides = (0, 0, 0) if dy is None else dy.stride()[:3]
    fields = x, dy, out, rstd, dweight, *to_parameter_fields(weight)
    return *fields, x.shape[2], *x.stride()[:3], *dy_strides


NO_SIDE: tuple[Argument, ...] = (*(None,) * 6, *(0,) * 8)


class _HeadsPlan:
    """Thread layout over a head, and the launch of either direction."""

    def __init__(
        self,
        xs: list[Tensor],
        dys: list[Tensor],
        outs: list[Tensor],
        weights: list[Tensor | None],
        tables: Tables,
        modes: HeadModes,
        norm: bool = True,
    ) -> None:
        x = self.x = xs[0]
        B, self.T, _, self.D = x.shape
        self.tokens = B * self.T if self.D else 0
        self.conjugate = modes.conjugate
        half = self.D // 2 if self.D % 2 == 0 else 1
        strides = [s for t in (*xs, *dys) for s in t.stride()[:3]]
        tensors = *xs, *dys, *outs, *weights
        angles = table_strides(tables, x)
        width, gather = _choose_accesses(tensors, tables, angles, half, strides)
        self.table_fields: tuple[Argument, ...] = (None, 0, 0, 0, 0) * 2
        if tables:
            (cos, sin), code = tables, TABLE_CODES[tables[0].dtype]
            self.table_fields = cos, code, *angles[0], sin, code, *angles[-1]
        weighted = any(w is not None for w in weights)
        lanes = min(32, max(4, next_power_of_two(ceil_div(ceil_div(self.D, 2), width))))
        self.groups, self.tokens_per_thread, long = HEADS_THREADS // lanes, 1, False
        if weighted and dys:
            self.tokens_per_thread = max(1, ceil_div(self.tokens, MOST_PARTIALS * self.groups))
            long = self.tokens_per_thread * max(t.shape[2] for t in xs) > MOST_WEIGHT_TERMS
        self.program = _choose_program(
            x.dtype, self.D, (width, lanes), modes, (bool(tables), gather), norm, weighted, long
        )

    def launch(
        self,
        kernel: str,
        sides: Sequence[tuple[Argument, ...]],
        share: int,
        eps: float,
        shared: int = 0,
    ) -> None:
        first, second = [*sides, NO_SIDE][:2]
        sizes = self.T, self.tokens, self.D, share
        device_of(self.x).launch(
            self.program,
            Launch(kernel, ceil_div(self.tokens, share), HEADS_THREADS, shared=shared),
            (*first, *second, *self.table_fields, *sizes, eps, self.conjugate),
        )


def _choose_accesses(
    tensors: Sequence[Tensor | None],
    tables: Tables,
    angles: TableStrides,
    half: int,
    strides: Sequence[int],
) -> tuple[int, bool]:
    """Return the elements of an access, and whether the tables must be read one by one."""
    if not tables:
        return choose_vector(tensors, half, *strides), False
    dtype, table_dtype = tensors[0].dtype, tables[0].dtype  # type: ignore[union-attr]
    adjacent = half == 1 or all(pair == 1 for _, _, pair in angles)
    if adjacent and (table_dtype == torch.float32 or table_dtype == dtype):
        rows = [stride for table in angles for stride in table[:2]]
        width = choose_vector((*tensors, *tables), half, *strides, *rows)
        if half % (2 * width) or width * tensors[0].element_size() == 16:  # type: ignore[union-attr]
            return width, False
        wider = choose_vector(tensors, half, *strides)
        return wider, wider > width
    return choose_vector(tensors, half, *strides), True


@functools.lru_cache(maxsize=4096)
def _choose_program(
    dtype: torch.dtype,
    D: int,
    layout: tuple[int, int],
    modes: HeadModes,
    rotation: tuple[bool, bool],
    norm: bool,
    weighted: bool,
    long: bool,
) -> Program:
    """Return the Program; layout: elements of an access and lanes; rotation: ROTATE and GATHER."""
    width, lanes = layout
    return make_program(
        "rope_qk_norm",
        dtype,
        VEC=width,
        LANES=lanes,
        ITEMS=max(1, ceil_div(ceil_div(D, 2), width * lanes)),
        ROTATE=int(rotation[0]),
        NORM=int(norm),
        NORM_FIRST=int(modes.norm_first),
        INTERLEAVED=int(modes.interleaved),
        WEIGHT=int(weighted),
        GATHER=int(rotation[1]),
        LONG=int(long),
    )
