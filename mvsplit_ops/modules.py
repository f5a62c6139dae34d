"""Modules that own the parameters of an operator."""

from collections.abc import Sequence

import torch

from mvsplit_ops.mvsplit_rmsnorm import mvsplit_rmsnorm, mvsplit_rmsnorm_with_mean


class MVSplitRMSNorm(torch.nn.Module):
    """The MV-Split merge of a trunk x and a branch f, with its gains as parameters.

    dim         D, the width of the trunk
    init_alpha  start of alpha, the gain of the mean of the branch: 0 in the paper
    init_beta   start of beta, the gain of its centred part: 1 with zero-initialised writers, 0.03
                with standard initialisation (1000 blocks)
    eps         of the RMSNorm

    Parameters alpha and beta (D,): keep them in float32 when the activations are 16-bit.
    forward(x, f, segments=None) -> y: see mvsplit_ops.mvsplit_rmsnorm; with carry=True y and jy,
    the jx of the next merge: see mvsplit_ops.mvsplit_rmsnorm_with_mean. arXiv 2605.06169, Sec. 5.
    """

    def __init__(
        self, dim: int, *, init_alpha: float = 0.0, init_beta: float = 1.0, eps: float = 1e-5
    ):
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
        x: torch.Tensor,
        f: torch.Tensor,
        segments: Sequence[int] | None = None,
        *,
        jx: torch.Tensor | None = None,
        carry: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        inputs, options = (x, f, self.alpha, self.beta), {"segments": segments, "eps": self.eps}
        if jx is None and not carry:
            return mvsplit_rmsnorm(*inputs, **options)
        y, jy = mvsplit_rmsnorm_with_mean(*inputs, jx=jx, **options)
        return (y, jy) if carry else y

    def extra_repr(self) -> str:
        gains = f"init_alpha={self.init_alpha}, init_beta={self.init_beta}"
        return f"{self.alpha.numel()}, {gains}, eps={self.eps}"
