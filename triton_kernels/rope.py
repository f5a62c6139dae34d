"""RoPE of one tensor: the rotation of _heads.py without the norm. Backward rotates by -theta."""

from mvsplit_ops.triton_kernels._common import find_missing
from mvsplit_ops.triton_kernels._heads import LAUNCHERS

__all__ = ["find_missing", "rope_bwd", "rope_fwd"]

rope_fwd, rope_bwd = LAUNCHERS.rope_fwd, LAUNCHERS.rope_bwd
