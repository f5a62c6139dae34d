"""The programs that models of common shapes need, to compile them before the first call."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mvsplit_ops import _cuda
from mvsplit_ops._cuda import device
from mvsplit_ops._cuda.launch import LIMITS, Argument, Launch, Limits, Program

WIDTHS = (1024, 1536, 2048)  # D, in heads of 64 and 128
SEGMENTS = ((256, 64), (256, 256), (320,))  # tokens


class LaunchRecorder:
    """A Device that launches nothing and lists the launches."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.launches: list[tuple[Program, Launch]] = []

    def holds(self, program: Program, launch: Launch) -> bool:
        return True

    def poison(self, t: Tensor) -> Tensor:
        return t

    def launch(self, program: Program, launch: Launch, args: Sequence[Argument]) -> None:
        if launch.grid:
            self.launches.append((program, launch))


@contextlib.contextmanager
def record_launches(architecture: str) -> Iterator[LaunchRecorder]:
    """Yield a recorder that takes the launches on meta tensors inside the block."""
    recorder = device.installed["meta"] = LaunchRecorder(LIMITS[architecture])
    try:
        yield recorder
    finally:
        del device.installed["meta"]


def list_launches(
    architecture: str, dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
) -> list[tuple[Program, Launch]]:
    """Return the launches of every kernel at the common shapes, without the rarer parameters."""
    with record_launches(architecture) as recorder, torch.device("meta"):
        for dtype, D in itertools.product(dtypes, WIDTHS):
            _call_swiglu(dtype, D)
            for Dh in (64, 128):
                _call_heads(dtype, D // Dh, Dh)
            for segments in SEGMENTS:
                _call_merges(dtype, segments, D)
    return list(dict.fromkeys(recorder.launches))


def list_programs(
    architecture: str, dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
) -> list[Program]:
    """Return every Program of `list_launches`, once."""
    return list(dict.fromkeys(program for program, _ in list_launches(architecture, dtypes)))


def _call_swiglu(dtype: torch.dtype, D: int) -> None:
    x = torch.empty(4, 16, 6 * D, dtype=dtype)
    _cuda.swiglu_bwd(_cuda.swiglu_fwd(x, None, True), x, None, True)


def _call_heads(dtype: torch.dtype, H: int, Dh: int) -> None:
    q = torch.empty(4, 16, H, Dh, dtype=dtype)
    cos = torch.empty(16, Dh // 2, dtype=torch.float32)
    for weight in (None, torch.empty(Dh, dtype=torch.float32)):
        _, _, q_rstd, k_rstd = _cuda.qk_norm_fwd(q, q, weight, weight, 1e-6)
        _cuda.qk_norm_bwd(q, q, q, q, q_rstd, k_rstd, weight, weight)
        modes = False, False, False  # interleaved, conjugate, norm_first
        _cuda.rope_qk_norm_fwd(q, q, cos, cos, weight, weight, 1e-6, *modes)
        _cuda.rope_qk_norm_bwd(q, q, q, q, cos, cos, q_rstd, k_rstd, weight, weight, *modes)
    _cuda.rope_fwd(q, cos, cos, False, False)


def _call_merges(dtype: torch.dtype, segments: Sequence[int], D: int) -> None:
    x = torch.empty(4, sum(segments), D, dtype=dtype)
    gain = torch.empty(D, dtype=torch.float32)
    for carry in (False, True):
        y, _, rstd, jx, jf = _cuda.mvsplit_rmsnorm_fwd(
            x, x, gain, gain, None, None, segments, 1e-5, carry
        )
    _cuda.mvsplit_rmsnorm_bwd(y, x, x, gain, gain, None, rstd, jx, jf, segments)
    for scale in (None, gain):
        y, rstd = _cuda.residual_rmsnorm_fwd(x, x, scale, None, 1e-5)
        _cuda.residual_rmsnorm_bwd(y, x, None if scale is None else x, scale, None, rstd)
