"""RoPE and QK-Norm of q and k in one launch; see _heads.py."""

from mvsplit_ops.triton_kernels._common import missing
from mvsplit_ops.triton_kernels._heads import backward, forward

__all__ = ["missing", "rope_qk_norm_bwd", "rope_qk_norm_fwd"]


def rope_qk_norm_fwd(q, k, cos, sin, q_weight, k_weight, eps, interleaved, conjugate, norm_first):
    ys, rstds = forward(
        [q, k],
        [q_weight, k_weight],
        (cos, sin),
        eps,
        interleaved=interleaved,
        conjugate=conjugate,
        norm=True,
        norm_first=norm_first,
    )
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
    grads, dweights = backward(
        [dq, dk],
        [q, k],
        [q_rstd, k_rstd],
        [q_weight, k_weight],
        (cos, sin),
        interleaved=interleaved,
        conjugate=conjugate,
        norm_first=norm_first,
    )
    return *grads, *dweights
