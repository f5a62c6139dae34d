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
    ceil_div,
    next_power_of_two,
    prepare_tables,
    require_heads,
    to_contiguous,
    to_unit_stride,
)

HEADS_THREADS = 128  # as in rope_qk_norm.cu


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
    share = plan.groups
    if weighted:
        share *= max(1, ceil_div(plan.tokens, MOST_PARTIALS * share))
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
        tables, table_strides = prepare_tables(tables, x)
        self.table_fields: tuple[Argument, ...] = (None, False, None, False, 0, 0)
        if tables:
            cos, sin = map(to_parameter_fields, tables)
            self.table_fields = *cos, *sin, *table_strides
        half = self.D // 2 if self.D % 2 == 0 else 1
        strides = [s for t in (*xs, *dys) for s in t.stride()[:3]]
        tensors = *xs, *dys, *outs, *weights, *tables
        width = choose_vector(tensors, half, *strides, *table_strides)
        weighted = any(w is not None for w in weights)
        self.program, self.groups = _lay_out(
            x.dtype, self.D, width, modes, bool(tables), norm, weighted
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


@functools.lru_cache(maxsize=4096)
def _lay_out(
    dtype: torch.dtype,
    D: int,
    width: int,
    modes: HeadModes,
    rotate: bool,
    norm: bool,
    weighted: bool,
) -> tuple[Program, int]:
    """Return the Program, and the number of tokens that a block works on at once."""
    pairs = ceil_div(D, 2)
    lanes = min(32, max(4, next_power_of_two(ceil_div(pairs, width))))
    program = make_program(
        "rope_qk_norm",
        dtype,
        VEC=width,
        LANES=lanes,
        ITEMS=max(1, ceil_div(pairs, width * lanes)),
        ROTATE=int(rotate),
        NORM=int(norm),
        NORM_FIRST=int(modes.norm_first),
        INTERLEAVED=int(modes.interleaved),
        WEIGHT=int(weighted),
    )
    return program, HEADS_THREADS // lanes
