"""How the row kernels of csrc/cuda/rows.cuh are laid out: residual_rmsnorm, mvsplit by sweeps."""

import functools
from dataclasses import dataclass

from mvsplit_ops._cuda.common import ceil_div
from mvsplit_ops._host import power_of_two

# Elements of each tensor a thread, of float32 accumulators, and threads of a block. Forward a warp
# has the paper's row of 1024: no barrier a row, eight 16-byte loads in flight, 80 registers.
# Backward holds three tensors and two column sums: half as many elements, 95 to 115 registers. The
# registers are the compiler's for sm_90a; the choice has no measurement on a GPU yet.
TABLE = {"forward": (32, 256), "backward": (16, 128)}
MOST_LANES = 512
# Rows of a block at least: 32 make the bytes of a float32 gain and of two rows of partial sums 1/5
# pass. More, once there are more blocks than run at once: 3 forward, 4 backward on each of 132 SMs.
FEWEST_ROWS = 32
BLOCKS = {"forward": 396, "backward": 528}


@dataclass(frozen=True)
class Rows:
    """The defines of a row kernel, and what follows from them."""

    direction: str
    width: int  # elements of an access
    lanes: int
    items: int
    threads: int

    @property
    def defines(self):
        values = {"VEC": self.width, "LANES": self.lanes, "ITEMS": self.items}
        return {**values, "THREADS": self.threads, "BACKWARD": int(self.direction == "backward")}

    @property
    def groups(self):
        return self.threads // self.lanes

    def shared(self, D, accumulator, vectors, sums):
        """Bytes of shared memory with so many vectors of D, and with sums over rows or without."""
        rows = self.groups if sums and self.groups > 1 else 0
        return (2 * self.threads // 32 + (vectors + rows) * D) * accumulator


@functools.lru_cache(maxsize=4096)
def layout(direction, D, accumulator, width):
    """The Rows of "forward" or "backward" over rows of D; accumulator: bytes of one."""
    elements, threads = TABLE[direction]
    elements = elements * 4 // accumulator
    lanes = min(MOST_LANES, max(32, power_of_two(ceil_div(D, elements))))
    return Rows(direction, width, lanes, ceil_div(D, lanes * width), max(threads, lanes))


def rows_per_block(direction, N):
    return max(FEWEST_ROWS, ceil_div(N, BLOCKS[direction]))


def require_shared(op, D, needed, limits):
    """A row's vectors must fit the shared memory of a block."""
    if needed > limits.shared:
        raise ValueError(
            f"{op}: backend 'cuda' holds the vectors of a row in shared memory: D = {D} needs "
            f"{needed} bytes, a block of {limits.architecture} has {limits.shared}; "
            "pass backend='triton'"
        )
