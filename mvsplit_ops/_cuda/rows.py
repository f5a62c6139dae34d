"""Thread layout of the kernels over rows of D: residual_rmsnorm, and mvsplit_rmsnorm by sweeps.

The kernels are built from csrc/cuda/rows.cuh.
"""

import functools
from dataclasses import dataclass

from mvsplit_ops._cuda.launch import Limits
from mvsplit_ops._host import ceil_div, next_power_of_two

# {direction: (elements of each tensor per thread with float32 accumulators, threads of a block)}.
# Forward, a warp holds the paper's row of 1024: no barrier per row, eight 16-byte loads in flight,
# 80 registers. Backward holds three tensors and two column sums: half as many elements, 95 to 115
# registers. Registers are the compiler's for sm_90a; the choice has not been measured on a GPU yet.
ROW_LAYOUTS = {"forward": (32, 256), "backward": (16, 128)}
MOST_LANES = 512
# Fewest rows of a block: with 32, the bytes of a float32 gain and of two rows of partial sums are
# 1/5 pass. A block takes more rows once there are more blocks than run at once (RESIDENT_BLOCKS): 3
# forward, 4 backward on each of 132 SMs.
FEWEST_ROWS_PER_BLOCK = 32
RESIDENT_BLOCKS = {"forward": 396, "backward": 528}
# Rows that a thread adds one after another, where a block may have more than the fewest rows: the
# error of a plain sum of equal terms grows with their number.
MOST_ROW_TERMS = 16


@dataclass(frozen=True)
class Rows:
    """The defines of a row kernel, and what follows from them."""

    direction: str
    width: int  # elements of an access
    lanes: int
    items: int
    threads: int

    @property
    def defines(self) -> dict[str, int]:
        values = {"VEC": self.width, "LANES": self.lanes, "ITEMS": self.items}
        return {**values, "THREADS": self.threads, "BACKWARD": int(self.direction == "backward")}

    @property
    def groups(self) -> int:
        return self.threads // self.lanes

    def count_shared(self, D: int, accumulator: int, vectors: int, sums: bool) -> int:
        """Return the bytes of shared memory that `vectors` of D take, with sums over rows or not.

        accumulator: bytes of one.
        """
        rows = self.groups if sums and self.groups > 1 else 0
        return (2 * self.threads // 32 + (vectors + rows) * D) * accumulator


@functools.lru_cache(maxsize=4096)
def lay_out_rows(direction: str, D: int, accumulator: int, width: int) -> Rows:
    """Return the Rows of "forward" or "backward" over rows of D; accumulator: bytes of one."""
    elements, threads = ROW_LAYOUTS[direction]
    elements = elements * 4 // accumulator
    lanes = min(MOST_LANES, max(32, next_power_of_two(ceil_div(D, elements))))
    return Rows(direction, width, lanes, ceil_div(D, lanes * width), max(threads, lanes))


def rows_per_block(rows: Rows, N: int, summed: bool) -> int:
    """Return the most rows of a block, of N in total; `summed`: it stores sums of its rows."""
    share = max(FEWEST_ROWS_PER_BLOCK, ceil_div(N, RESIDENT_BLOCKS[rows.direction]))
    return min(share, max(FEWEST_ROWS_PER_BLOCK, MOST_ROW_TERMS * rows.groups)) if summed else share


def require_shared(op: str, D: int, needed: int, limits: Limits) -> None:
    """Raise ValueError if the vectors of a row do not fit in the shared memory of a block."""
    if needed > limits.shared:
        raise ValueError(
            f"{op}: backend 'cuda' holds the vectors of a row in shared memory: D = {D} needs "
            f"{needed} bytes, a block of {limits.architecture} has {limits.shared}; "
            "pass backend='triton'"
        )
