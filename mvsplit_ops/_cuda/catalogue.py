"""The programs that models of usual shapes need: what is compiled ahead of the first call."""

import contextlib
import itertools

import torch

from mvsplit_ops import _cuda
from mvsplit_ops._cuda import device
from mvsplit_ops._cuda.launch import LIMITS

WIDTHS = (1024, 1536, 2048)  # D, in heads of 64 and 128
SEGMENTS = ((256, 64), (256, 256), (320,))  # tokens


class Recorder:
    """A Device that launches nothing and keeps what it was asked for."""

    def __init__(self, limits):
        self.limits, self.launches = limits, []

    def holds(self, program, launch):
        return True

    def poison(self, t):
        return t

    def launch(self, program, launch, args):
        if launch.grid:
            self.launches.append((program, launch))


@contextlib.contextmanager
def recording(architecture):
    """Within the block, kernels on meta tensors are launched on the Recorder that it gives."""
    recorder = device.installed["meta"] = Recorder(LIMITS[architecture])
    try:
        yield recorder
    finally:
        del device.installed["meta"]


def launches(architecture, dtypes=(torch.bfloat16,)):
    """(Program, Launch) of every kernel at the usual shapes, without parameters that few use."""
    with recording(architecture) as recorder, torch.device("meta"):
        for dtype, D in itertools.product(dtypes, WIDTHS):
            _swiglu(dtype, D)
            for Dh in (64, 128):
                _heads(dtype, D // Dh, Dh)
            for segments in SEGMENTS:
                _merges(dtype, segments, D)
    return list(dict.fromkeys(recorder.launches))


def programs(architecture, dtypes=(torch.bfloat16,)):
    """Every Program of `launches`, once."""
    return list(dict.fromkeys(program for program, _ in launches(architecture, dtypes)))


def _swiglu(dtype, D):
    x = torch.empty(4, 16, 6 * D, dtype=dtype)
    _cuda.swiglu_bwd(_cuda.swiglu_fwd(x), x)


def _heads(dtype, H, Dh):
    q = torch.empty(4, 16, H, Dh, dtype=dtype)
    cos = torch.empty(16, Dh // 2, dtype=torch.float32)
    for weight in (None, torch.empty(Dh, dtype=torch.float32)):
        _, _, *rstds = _cuda.qk_norm_fwd(q, q, weight, weight, 1e-6)
        _cuda.qk_norm_bwd(q, q, q, q, *rstds, weight, weight)
        flags = False, False, False  # interleaved, conjugate, norm_first
        _cuda.rope_qk_norm_fwd(q, q, cos, cos, weight, weight, 1e-6, *flags)
        _cuda.rope_qk_norm_bwd(q, q, q, q, cos, cos, *rstds, weight, weight, *flags)
    _cuda.rope_fwd(q, cos, cos, False, False)


def _merges(dtype, segments, D):
    x = torch.empty(4, sum(segments), D, dtype=dtype)
    gain = torch.empty(D, dtype=torch.float32)
    merge = x, x, gain, gain, None
    for jx, carry in ((None, False), (None, True)):
        y, _, rstd, jx, jf = _cuda.mvsplit_rmsnorm_fwd(*merge, jx, segments, 1e-5, carry)
    _cuda.mvsplit_rmsnorm_bwd(y, *merge, rstd, jx, jf, segments)
    for scale in (None, gain):
        y, rstd = _cuda.residual_rmsnorm_fwd(x, x, scale, None, 1e-5)
        _cuda.residual_rmsnorm_bwd(y, x, None if scale is None else x, scale, None, rstd)
