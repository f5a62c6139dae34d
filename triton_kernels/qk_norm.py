"""QK-Norm of q and k in one launch: the norm of _heads.py without its rotation."""

from mvsplit_ops.triton_kernels._common import missing
from mvsplit_ops.triton_kernels._heads import backward, forward

__all__ = ["missing", "qk_norm_bwd", "qk_norm_fwd"]

_NO_ROTATION = {"interleaved": False, "conjugate": False, "norm_first": False}


def qk_norm_fwd(q, k, q_weight, k_weight, eps):
    ys, rstds = forward([q, k], [q_weight, k_weight], (), eps, norm=True, **_NO_ROTATION)
    return *ys, *rstds


def qk_norm_bwd(dq, dk, q, k, q_rstd, k_rstd, q_weight, k_weight):
    grads, dweights = backward(
        [dq, dk], [q, k], [q_rstd, k_rstd], [q_weight, k_weight], (), **_NO_ROTATION
    )
    return *grads, *dweights
