"""Launchers of csrc/cuda/rope_qk_norm.cu: rope, qk_norm and rope_qk_norm are its modes."""

import functools

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
from mvsplit_ops._host import dense, power_of_two, require_heads, tables, with_rows

THREADS = 128  # as in rope_qk_norm.cu
# Rows of partial sums of dw at most: some blocks for each of 132 SMs, and little to add.
MOST_PARTIALS = 1024


def rope_fwd(x, cos, sin, interleaved, conjugate):
    flags = {"interleaved": interleaved, "conjugate": conjugate, "norm_first": False}
    return _forward([x], [None], (cos, sin), 0.0, norm=False, **flags)[0][0]


def rope_bwd(dy, cos, sin, interleaved, conjugate):
    return rope_fwd(dy, cos, sin, interleaved, not conjugate)


def qk_norm_fwd(q, k, q_weight, k_weight, eps):
    flags = {"interleaved": False, "conjugate": False, "norm_first": False}
    ys, rstds = _forward([q, k], [q_weight, k_weight], (), eps, norm=True, **flags)
    return *ys, *rstds


def qk_norm_bwd(dq, dk, q, k, q_rstd, k_rstd, q_weight, k_weight):
    flags = {"interleaved": False, "conjugate": False, "norm_first": False}
    return _backward([dq, dk], [q, k], [q_rstd, k_rstd], [q_weight, k_weight], (), **flags)


def rope_qk_norm_fwd(q, k, cos, sin, q_weight, k_weight, eps, interleaved, conjugate, norm_first):
    flags = {"interleaved": interleaved, "conjugate": conjugate, "norm_first": norm_first}
    ys, rstds = _forward([q, k], [q_weight, k_weight], (cos, sin), eps, norm=True, **flags)
    return *ys, *rstds


def rope_qk_norm_bwd(
    dq,
    dk,
    q,
    k,
    cos,
    sin,
    q_rstd,
    k_rstd,
    q_weight,
    k_weight,
    interleaved,
    conjugate,
    norm_first,
):
    flags = {"interleaved": interleaved, "conjugate": conjugate, "norm_first": norm_first}
    rstds, weights = [q_rstd, k_rstd], [q_weight, k_weight]
    return _backward([dq, dk], [q, k], rstds, weights, (cos, sin), **flags)


def _forward(xs, weights, angles, eps, *, norm, **flags):
    """Of x, or of q and k: [result], [rstd or None]."""
    xs, weights = [with_rows(x) for x in xs], dense(*weights)
    ys = [new(x, x.shape) for x in xs]
    rstds = [new_statistics(x, *x.shape[:3]) if norm else None for x in xs]
    plan = _Plan(xs, [None] * len(xs), ys, weights, angles, norm, flags)
    sides = zip(xs, ys, rstds, weights, strict=True)
    sides = [_side(x, None, y, rstd, None, w) for x, y, rstd, w in sides]
    plan.launch("heads_fwd", sides, plan.groups, eps)
    return ys, rstds


def _backward(dys, kept, rstds, weights, angles, **flags):
    """Of q and k: dq, dk, dq_weight, dk_weight (empty without a weight)."""
    require_heads(dys, kept, rstds, weights)
    dys, kept = [with_rows(t) for t in dys], [with_rows(t) for t in kept]
    rstds, weights = dense(*rstds), dense(*weights)
    dxs = [new(x, x.shape) for x in kept]
    plan = _Plan(kept, dys, dxs, weights, angles, True, flags)
    weighted, width = sum(w is not None for w in weights), kept[0].shape[3]
    share = plan.groups
    if weighted:
        share *= max(1, ceil_div(plan.tokens, MOST_PARTIALS * share))
    blocks = ceil_div(plan.tokens, share)
    partials = new_statistics(kept[0], weighted, blocks, width)
    rows = iter(partials)
    dweights = [None if w is None else next(rows) for w in weights]
    sides = zip(kept, dys, dxs, rstds, dweights, weights, strict=True)
    warps = THREADS // 32 * width * partials.element_size() if weighted else 0
    plan.launch("heads_bwd", [_side(*side) for side in sides], share, 0.0, shared=warps)
    sums = iter(sum_rows(partials, plan.program) if weighted else ())
    none = [new_statistics(kept[0], 0) for _ in weights]
    return *dxs, *(n if w is None else next(sums) for w, n in zip(weights, none, strict=True))


def _side(x, dy, out, rstd, dweight, weight):
    """The fields of a `Side`."""
    dy_strides = (0, 0, 0) if dy is None else dy.stride()[:3]
    fields = x, dy, out, rstd, dweight, *parameter(weight)
    return *fields, x.shape[2], *x.stride()[:3], *dy_strides


NO_SIDE = (None,) * 6 + (0,) * 8


class _Plan:
    """How the threads are laid out over a head, and the launch of either direction."""

    def __init__(self, xs, dys, outs, weights, angles, norm, flags):
        x = self.x = xs[0]
        B, self.T, _, self.D = x.shape
        self.tokens = B * self.T if self.D else 0
        rotate, self.conjugate = bool(angles), flags["conjugate"]
        self.angles, self.table_strides = tables(angles, x) if rotate else ((None, None), (0, 0))
        half = self.D // 2 if self.D % 2 == 0 else 1
        strides = [s for t in (*xs, *dys) if t is not None for s in t.stride()[:3]]
        tensors = *xs, *dys, *outs, *weights, *self.angles
        width = vector(tensors, half, *strides, *self.table_strides)
        modes = rotate, norm, flags["norm_first"], flags["interleaved"]
        weighted = any(w is not None for w in weights)
        self.program, self.groups = _layout(x.dtype, self.D, width, *modes, weighted)

    def launch(self, kernel, sides, share, eps, shared=0):
        sides = [*sides, NO_SIDE][:2]
        cos, sin = self.angles
        device_of(self.x).launch(
            self.program,
            Launch(kernel, ceil_div(self.tokens, share), THREADS, shared=shared),
            (
                *(*sides[0], *sides[1], *parameter(cos), *parameter(sin), *self.table_strides),
                *(self.T, self.tokens, self.D, share, eps, self.conjugate),
            ),
        )


@functools.lru_cache(maxsize=4096)
def _layout(dtype, D, width, rotate, norm, norm_first, interleaved, weighted):
    """The Program, and the tokens that a block has in hand at once."""
    pairs = ceil_div(D, 2)
    lanes = min(32, max(4, power_of_two(ceil_div(pairs, width))))
    made = program(
        "rope_qk_norm",
        dtype,
        VEC=width,
        LANES=lanes,
        ITEMS=max(1, ceil_div(pairs, width * lanes)),
        ROTATE=int(rotate),
        NORM=int(norm),
        NORM_FIRST=int(norm_first),
        INTERLEAVED=int(interleaved),
        WEIGHT=int(weighted),
    )
    return made, THREADS // lanes
