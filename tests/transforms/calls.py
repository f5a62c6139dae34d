"""Calls of every operator in float64, as functions of tensors only, which torch.func transforms."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import mvsplit_ops as mv

B, T, D, H, DH, F = 2, 5, 6, 3, 4, 5


def doubles(shape, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed + 7 * len(shape) + sum(shape))
    t = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return t.to(torch.get_default_device())


def angles(*shape):
    count = math.prod(shape) * DH // 2
    angle = torch.arange(count, dtype=torch.float64).square().view(*shape, DH // 2)
    return angle.cos(), angle.sin()


@dataclass(frozen=True)
class Call:
    """One way to call an operator.

    run          (*tensors) -> results
    gradients    number of results that have a gradient
    """

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    gradients: int

    def results(self, *args):
        """Return the results that have a gradient, as a tuple."""
        return tuple(tree_leaves(self.run(*args)))[: self.gradients]


def merge_shapes(b, t, parameters):
    return [(b, t, D), (b, t, D), *[(D,)] * parameters]


def head_shapes(b, t, weights):
    return [(b, t, H, DH), (b, t, 1, DH), *[(DH,)] * weights]


def rope(x, table, **options):
    return mv.rope(x, *(t[0] for t in table), **options)


def rope_by_sample(x, table, **options):
    return mv.rope(x, *table, interleaved=True, **options)


def merge(x, f, alpha, beta, **options):
    return mv.mvsplit_rmsnorm(x, f, alpha, beta, segments=(x.shape[1] - 1, 1), **options)


def rope_qk_norm(q, k, weight, table, **options):
    return mv.rope_qk_norm(q, k, *table, weight, **options)


# {name: (function, (B, T) -> shapes of its tensors, number of results that have a gradient)}
CALLS = {
    "mvsplit_rmsnorm": (merge, lambda b, t: merge_shapes(b, t, 2), 1),
    "mvsplit_rmsnorm, weight": (mv.mvsplit_rmsnorm, lambda b, t: merge_shapes(b, t, 3), 1),
    "carried mean": (mv.mvsplit_rmsnorm_with_mean, lambda b, t: merge_shapes(b, t, 2), 1),
    "residual_rmsnorm": (mv.residual_rmsnorm, lambda b, t: merge_shapes(b, t, 0), 1),
    "residual_rmsnorm, scale and weight": (
        mv.residual_rmsnorm,
        lambda b, t: merge_shapes(b, t, 2),
        1,
    ),
    "swiglu": (mv.swiglu, lambda b, t: [(b, t, 2 * F)], 1),
    "swiglu of two tensors": (mv.swiglu, lambda b, t: [(b, t, F)] * 2, 1),
    "rope": (rope, lambda b, t: [(b, t, H, DH)], 1),
    "rope, a table per sample": (rope_by_sample, lambda b, t: [(b, t, H, DH)], 1),
    "qk_norm": (mv.qk_norm, lambda b, t: head_shapes(b, t, 0), 2),
    "qk_norm, weights": (mv.qk_norm, lambda b, t: head_shapes(b, t, 2), 2),
    "rope_qk_norm, weight": (rope_qk_norm, lambda b, t: head_shapes(b, t, 1), 2),
}


def calls_of(name, backend, tiny=False):
    """Return a call on a backend, the same on the reference, and its tensors."""
    function, shapes, gradients = CALLS[name]
    b, t = (1, 2) if tiny else (B, T)
    tables = {"table": angles(b, t)} if "rope" in name else {}
    fused, exact = (
        Call(functools.partial(function, backend=name, **tables), gradients)
        for name in (backend, "reference")
    )
    return fused, exact, [doubles(s, i) for i, s in enumerate(shapes(b, t))]
