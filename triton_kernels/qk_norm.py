"""QK-Norm of q and k in one launch: the norm of _heads.py without the rotation."""

from mvsplit_ops.triton_kernels._common import find_missing
from mvsplit_ops.triton_kernels._heads import LAUNCHERS

__all__ = ["find_missing", "qk_norm_bwd", "qk_norm_fwd"]

qk_norm_fwd, qk_norm_bwd = LAUNCHERS.qk_norm_fwd, LAUNCHERS.qk_norm_bwd
