"""Backend `cuda`: the kernels of csrc/cuda, compiled at run time or ahead of it.

    <op>.py        launchers: which kernel, how many threads, with what
    compile.py     source to machine code: prebuilt, from the disk cache, or by NVRTC
    gpu.py         the driver: limits of a GPU, loading, launching
    device.py      what the two sides say to each other

What is here are the kernel functions that mvsplit_ops/_backends.py looks for:
<op>_fwd and <op>_bwd.
"""

from mvsplit_ops._cuda.device import installed
from mvsplit_ops._cuda.heads import (
    qk_norm_bwd,
    qk_norm_fwd,
    rope_bwd,
    rope_fwd,
    rope_qk_norm_bwd,
    rope_qk_norm_fwd,
)
from mvsplit_ops._cuda.mvsplit_rmsnorm import mvsplit_rmsnorm_bwd, mvsplit_rmsnorm_fwd
from mvsplit_ops._cuda.residual_rmsnorm import residual_rmsnorm_bwd, residual_rmsnorm_fwd
from mvsplit_ops._cuda.swiglu import swiglu_bwd, swiglu_fwd

__all__ = [
    "missing",
    "mvsplit_rmsnorm_bwd",
    "mvsplit_rmsnorm_fwd",
    "qk_norm_bwd",
    "qk_norm_fwd",
    "residual_rmsnorm_bwd",
    "residual_rmsnorm_fwd",
    "rope_bwd",
    "rope_fwd",
    "rope_qk_norm_bwd",
    "rope_qk_norm_fwd",
    "swiglu_bwd",
    "swiglu_fwd",
]


def missing(device_type):
    """Why these kernels cannot run on tensors of a device type; None when they can."""
    if device_type in installed:
        return None
    if device_type != "cuda":
        return f"it takes tensors on cuda, not {device_type}"
    from mvsplit_ops._cuda import gpu

    return gpu.why_not()
