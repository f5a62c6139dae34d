"""RoPE of one tensor: the rotation of _heads.py without its norm. Its backward is the inverse."""

from mvsplit_ops.triton_kernels._common import missing
from mvsplit_ops.triton_kernels._heads import forward

__all__ = ["missing", "rope_bwd", "rope_fwd"]


def rope_fwd(x, cos, sin, interleaved, conjugate):
    (y,), _ = forward(
        [x],
        [None],
        (cos, sin),
        0.0,
        interleaved=interleaved,
        conjugate=conjugate,
        norm=False,
        norm_first=False,
    )
    return y


def rope_bwd(dy, cos, sin, interleaved, conjugate):
    return rope_fwd(dy, cos, sin, interleaved, not conjugate)
