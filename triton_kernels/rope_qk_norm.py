"""RoPE and QK-Norm of q and k in one launch; see _heads.py."""

from mvsplit_ops.triton_kernels._common import find_missing
from mvsplit_ops.triton_kernels._heads import LAUNCHERS

__all__ = ["find_missing", "rope_qk_norm_bwd", "rope_qk_norm_fwd"]

rope_qk_norm_fwd, rope_qk_norm_bwd = LAUNCHERS.rope_qk_norm_fwd, LAUNCHERS.rope_qk_norm_bwd
