"""Modules that own the parameters of an operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvsplit_ops.mvsplit_rmsnorm import mvsplit_rmsnorm, mvsplit_rmsnorm_with_mean


class MVSplitRMSNorm(torch.nn.Module):
    """The MV-Split merge of a residual stream x and a branch f, with its gains as parameters.

        merge = mv.MVSplitRMSNorm(1024)
        y = merge(x, f, segments=(256, 64))

    dim         D, the width of the residual stream
    init_alpha  initial alpha, the gain of the mean of the branch; 0 in the paper
    init_beta   initial beta, the gain of its centred part: 1 with zero-initialised writers, 0.03
                with standard initialisation (1000 blocks)
    eps         of the RMSNorm

    Parameters alpha and beta are (D,); keep them in float32 when the activations are 16-bit.
    forward(x, f, segments=None) returns y: see mvsplit_ops.mvsplit_rmsnorm. With carry=True it
    returns y and jy, the jx of the next merge: see mvsplit_ops.mvsplit_rmsnorm_with_mean.
    arXiv 2605.06169, Sec. 5.
    """

    def __init__(
        self, dim: int, *, init_alpha: float = 0.0, init_beta: float = 1.0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.init_alpha, self.init_beta, self.eps = init_alpha, init_beta, eps
        self.alpha = torch.nn.Parameter(torch.empty(dim))
        self.beta = torch.nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.alpha, self.init_alpha)
        torch.nn.init.constant_(self.beta, self.init_beta)

    def forward(
        self,
        x: Tensor,
        f: Tensor,
        segments: Sequence[int] | None = None,
        *,
        jx: Tensor | None = None,
        carry: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        inputs = x, f, self.alpha, self.beta
        if jx is None and not carry:
            return mvsplit_rmsnorm(*inputs, segments=segments, eps=self.eps)
        y, jy = mvsplit_rmsnorm_with_mean(*inputs, jx=jx, segments=segments, eps=self.eps)
        return (y, jy) if carry else y

    def extra_repr(self) -> str:
        gains = f"init_alpha={self.init_alpha}, init_beta={self.init_beta}"
        return f"{self.alpha.numel()}, {gains}, eps={self.eps}"
