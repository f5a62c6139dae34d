"""Rows of a residual merge: what mvsplit_rmsnorm and residual_rmsnorm share.

    y = z * rstd * weight    rstd = rsqrt(mean_d z^2 + eps)    n = z * rstd
    dz = rstd * (g - n * mean_d(g * n))    g = dy * weight     dweight = sum dy * n

A program owns a run of rows of N = B * T and walks through them a tile [rows, D] at a time, with
the parameter vectors in registers: read once a program, not once a row.
"""

import triton
import triton.language as tl

from mvsplit_ops._host import power_of_two
from mvsplit_ops.triton_kernels._common import wide

# Elements of each tensor a thread. 16: two 16-byte loads of bf16 in flight of each, and a backward
# of three tensors stays below 128 registers. 8 where the weight, beta and the shift of a segment,
# and three column sums, lie in registers too: 16 would take 160.
ELEMENTS = {"plain": 16, "weighted backward": 8}
WARPS = 4  # at least: what makes a row of the paper's D = 1024 a tile of two rows; at most 32
# Rows of a program at least: 16 rows make the bytes of a float32 parameter vector 1/8 pass. More,
# once there are more programs than run at once (4 of 128 threads on each of 132 SMs), for then a
# longer run costs no parallelism.
FEWEST_ROWS = 16
PROGRAMS = 528


def tile(D, kind="plain"):
    """The constants of a row kernel of width D."""
    elements, block = 32 * ELEMENTS[kind], power_of_two(D)
    warps = min(max(WARPS, block // elements), 32)
    return {"D": D, "ROWS": max(1, warps * elements // block), "BLOCK_D": block, "num_warps": warps}


def rows_per_program(N):
    return max(FEWEST_ROWS, -(-N // PROGRAMS))


@triton.jit
def load_rows(t, r, d, live, D: tl.constexpr):
    """Rows r of t, widened; rows that are not live are zero."""
    at = t + r.to(tl.int64)[:, None] * D + d[None, :]
    return wide(tl.load(at, live[:, None] & (d < D)[None, :], other=0))


@triton.jit
def store_rows(t, r, d, values, live, D: tl.constexpr):
    at = t + r.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, values.to(t.dtype.element_ty), live[:, None] & (d < D)[None, :])


@triton.jit
def load_vector(t, d, D: tl.constexpr):
    return wide(tl.load(t + d, d < D, other=0))


@triton.jit
def mean_d(t, D: tl.constexpr):
    return tl.sum(t, 1) / D
