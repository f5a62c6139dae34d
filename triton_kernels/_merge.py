"""Rows of a merge of stream and branch: helpers of mvsplit_rmsnorm and residual_rmsnorm.

    y = z * rstd * weight    rstd = rsqrt(mean_d z^2 + eps)    n = z * rstd
    dz = rstd * (g - n * mean_d(g * n))    g = dy * weight     dweight = sum dy * n

A program owns consecutive rows of N = B * T and processes a tile [rows, D] at a time. It reads the
parameter vectors once, into registers, not once per row. Preconditions: contiguous tensors; the
launchers copy others.

Sums over rows: a program adds at most BLOCK_TILES tiles in registers, then adds that block to its
row of partial sums in memory, because registers for a second level of sums would spill. Its row has
at most MOST_BLOCKS blocks, and add_exactly adds the rows of all programs.
"""

import triton
import triton.language as tl

from mvsplit_ops._host import ceil_div, next_power_of_two
from mvsplit_ops.triton_kernels._common import wide

# Elements of each tensor per thread. With 16, two 16-byte loads of bf16 of each tensor are in
# flight, and a backward of three tensors stays below 128 registers. With a weight, backward also
# holds the weight, beta, the shift of a segment and three column sums in registers: 16 elements
# would take 160, so it has 8.
ELEMENTS = {"plain": 16, "weighted backward": 8}
FEWEST_WARPS, MOST_WARPS = 4, 32  # 4 warps process two rows of the paper's D = 1024 at a time
# Fewest rows of a program: with 16, the bytes of a float32 parameter vector are 1/8 pass. A program
# takes more rows once there are more programs than run at once (4 of 128 threads on each of 132
# SMs), because more rows then cost no parallelism.
FEWEST_ROWS = 16
RESIDENT_PROGRAMS = 528
BLOCK_TILES, MOST_BLOCKS = tl.constexpr(32), 16


def choose_tile(D: int, kind: str = "plain") -> dict[str, int]:
    """Return the constants of a row kernel of width D."""
    elements, block = 32 * ELEMENTS[kind], next_power_of_two(D)
    warps = min(max(FEWEST_WARPS, block // elements), MOST_WARPS)
    return {"D": D, "ROWS": max(1, warps * elements // block), "BLOCK_D": block, "num_warps": warps}


def rows_per_program(N: int) -> int:
    return max(FEWEST_ROWS, ceil_div(N, RESIDENT_PROGRAMS))


def summed_rows_per_program(N: int, tile: dict[str, int]) -> int:
    """Return the rows of a program that stores their sums in one row of partial sums."""
    return min(rows_per_program(N), MOST_BLOCKS * BLOCK_TILES.value * tile["ROWS"])


@triton.jit
def add_block(row, values, live, again):
    """Store a row of partial sums; if this program has stored it before, add to it."""
    if again:
        tl.debug_barrier()  # a thread may load what another has stored
        values += tl.load(row, live, other=0)
    tl.store(row, values, live)


@triton.jit
def tile_rows(first, ROWS: tl.constexpr):
    """Return `ROWS` rows from `first`, neighbours half a tile apart: tl.sum adds them first."""
    i = tl.arange(0, ROWS)
    if ROWS > 1:
        i = i % (ROWS // 2) * 2 + i // (ROWS // 2)
    return first + i


@triton.jit
def load_rows(t, r, d, live, D: tl.constexpr):
    """Return rows r of t in the dtype of arithmetic; rows that are not live are zero."""
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
