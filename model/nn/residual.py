"""Residual connections: modules that merge the output of a branch into the trunk.

A merge computes the next trunk from the trunk x and the branch f, both (B, T, D), with an RMSNorm:

    post            RMSNorm(x + f)
    layerscale      RMSNorm(x + scale f), scale (D,)
    rezero          RMSNorm(x + scale f), scale a scalar that starts at 0
    mvsplit         mvsplit_ops.MVSplitRMSNorm
    hard_center     mvsplit with constant gains alpha 0 and beta 1: no update moves the token mean
    attention_only  mvsplit after attention, post after the SwiGLU

The last two are negative controls of arXiv 2605.06169, which states only their names; the
definitions are this project's.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

import mvsplit_ops as mv
from model.config import Config

MERGE_EPS = 1e-5  # of the RMSNorm in a merge


class PlainMerge(nn.Module):
    """RMSNorm(x + scale f); `shape` is that of the scale, None: no scale."""

    def __init__(self, shape: tuple[int, ...] | None = None, init_scale: float = 1.0) -> None:
        super().__init__()
        self.init_scale = init_scale
        self.scale = None if shape is None else nn.Parameter(torch.empty(shape))

    def reset_parameters(self) -> None:
        if self.scale is not None:
            nn.init.constant_(self.scale, self.init_scale)

    def forward(
        self,
        x: Tensor,
        f: Tensor,
        segments: Sequence[int],
        jx: Tensor | None = None,
        carry: bool = False,
    ) -> Tensor | tuple[Tensor, None]:
        """Return the next trunk, and None as its means if `carry`, as MVSplitRMSNorm does."""
        y = mv.residual_rmsnorm(x, f, self.scale, eps=MERGE_EPS)
        return (y, None) if carry else y


Merge: TypeAlias = mv.MVSplitRMSNorm | PlainMerge


def make_merges(config: Config) -> tuple[Merge, Merge]:
    """Return the merges after attention and after the SwiGLU, by config.residual."""

    def mvsplit(alpha: float = config.init_alpha, beta: float = config.init_beta) -> Merge:
        return mv.MVSplitRMSNorm(config.dim, init_alpha=alpha, init_beta=beta, eps=MERGE_EPS)

    makers: dict[str, tuple[Callable[[], Merge], Callable[[], Merge]]] = {
        "post": (PlainMerge,) * 2,
        "layerscale": (lambda: PlainMerge((config.dim,), config.init_scale),) * 2,
        "rezero": (lambda: PlainMerge((), 0.0),) * 2,
        "mvsplit": (mvsplit,) * 2,
        "hard_center": (lambda: mvsplit(0.0, 1.0).requires_grad_(False),) * 2,
        "attention_only": (mvsplit, PlainMerge),
    }
    after_attention, after_swiglu = makers[config.residual]
    return after_attention(), after_swiglu()
