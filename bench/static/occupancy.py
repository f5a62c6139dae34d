"""How many blocks of a kernel an SM runs at once: by calculation, for a GPU that need not be here.

A block takes registers, threads and shared memory from its SM, and one of the SM's places for
blocks; whichever runs out first limits them. The shared memory is what is left where the L1 cache
is as small as it can be. Blocks of a cluster must also find SMs of one group of them free
together, which is not counted here.
"""

from dataclasses import dataclass

from mvsplit_ops._cuda.gpu import architecture as spelled
from mvsplit_ops._cuda.launch import LIMITS

WARP = 32
MOST_THREADS, MOST_REGISTERS = 1024, 255  # of a block; of a thread
REGISTERS, PARTITIONS = 65536, 4  # of an SM; a warp's registers lie in one partition
REGISTERS_UNIT, SHARED_UNIT = 256, 128  # of a warp; bytes of a block
RESERVED = 1024  # bytes of shared memory that CUDA takes of each block


@dataclass(frozen=True)
class SM:
    """Threads and blocks that can be resident."""

    threads: int
    blocks: int


# By compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability". Bytes of shared memory are in LIMITS.
SMS = {
    80: SM(2048, 32),
    86: SM(1536, 16),
    89: SM(1536, 24),
    90: SM(2048, 32),
    100: SM(2048, 32),
    120: SM(1536, 24),
}


def limits(architecture):
    """The Limits of a compute capability, 80 or 90, as the launchers take them."""
    return LIMITS[spelled(divmod(architecture, 10))]


def room(architecture, registers, threads, shared):
    """{resource: blocks of an SM that it has room for}; 0 where one block is more than may be.

    registers of a thread, threads of a block, shared: bytes of a block, static and dynamic.
    """
    sm, memory, warps = SMS[architecture], limits(architecture), -(-threads // WARP)
    of_warp = _up(registers * WARP, REGISTERS_UNIT)
    warps_by_registers = REGISTERS // PARTITIONS // of_warp * PARTITIONS
    return {
        "threads": sm.threads // (warps * WARP) if threads <= MOST_THREADS else 0,
        "blocks": sm.blocks,
        "registers": warps_by_registers // warps if registers <= MOST_REGISTERS else 0,
        "shared memory": memory.shared_sm // _up(shared + RESERVED, SHARED_UNIT)
        if shared <= memory.shared
        else 0,
    }


def blocks_per_sm(architecture, registers, threads, shared):
    """Blocks of a kernel that an SM holds at once; 0: it cannot be launched."""
    return min(room(architecture, registers, threads, shared).values())


def limited_by(architecture, registers, threads, shared):
    """What keeps further blocks away: "threads", "blocks", "registers" or "shared memory".

    Of several the first in that order: where an SM is full, a kernel with fewer registers gains
    nothing.
    """
    found = room(architecture, registers, threads, shared)
    return min(found, key=found.get)


def warps_share(architecture, threads, blocks):
    """The part of an SM's warps that so many blocks occupy: 1 is all of them."""
    return blocks * -(-threads // WARP) * WARP / SMS[architecture].threads


def _up(size, unit):
    return -(-size // unit) * unit
