"""Backend `cuda`: the kernels of csrc/cuda, compiled at run time or ahead of time.

    heads.py, swiglu.py, mvsplit_rmsnorm.py, residual_rmsnorm.py
                   launchers: choose the program, the number of threads and the arguments
    common.py      helpers of all launchers;  rows.py  thread layout of kernels over rows of D
    launch.py      Program, Launch, Limits and packed arguments, which launchers pass to a device
    device.py      the device of a tensor: a GPU, or an emulator
    gpu.py         the CUDA driver: limits of a GPU, loading, launching
    compile.py     source to machine code: prebuilt, from the disk cache, or by NVRTC
    catalogue.py   the programs of common model shapes, to compile ahead of time

The names exported here are the kernel functions that mvsplit_ops/_backends.py looks for: <op>_fwd
and <op>_bwd.
"""

from mvsplit_ops._cuda import gpu
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
    "find_missing",
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


def find_missing(device_type: str) -> str | None:
    """Return why these kernels cannot run on tensors of a device type, or None if they can."""
    if device_type in installed:
        return None
    if device_type != "cuda":
        return f"it takes tensors on cuda, not {device_type}"
    return gpu.find_missing()
