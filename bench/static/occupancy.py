"""Blocks of a kernel that an SM runs at the same time, by calculation: no GPU is needed.

A block takes registers, threads, shared memory and one of the block slots of its SM; the resource
that runs out first limits the number of blocks. Shared memory is what remains with the smallest L1
cache. The blocks of a cluster must also fit into one group of SMs at the same time, which is not
counted here.
"""

from dataclasses import dataclass

from mvsplit_ops._cuda.gpu import architecture as architecture_name
from mvsplit_ops._cuda.launch import LIMITS, Limits

WARP = 32
MOST_THREADS, MOST_REGISTERS = 1024, 255  # of a block; of a thread
REGISTERS, PARTITIONS = 65536, 4  # of an SM; the registers of a warp are in one partition
REGISTERS_UNIT, SHARED_UNIT = 256, 128  # allocation units: registers of a warp, bytes of a block
RESERVED = 1024  # bytes of shared memory that CUDA takes from each block


@dataclass(frozen=True)
class ResidencyLimits:
    """Threads and blocks that can be resident on an SM."""

    threads: int
    blocks: int


# By compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability". Bytes of shared memory are in LIMITS.
RESIDENCY = {
    80: ResidencyLimits(2048, 32),
    86: ResidencyLimits(1536, 16),
    89: ResidencyLimits(1536, 24),
    90: ResidencyLimits(2048, 32),
    100: ResidencyLimits(2048, 32),
    120: ResidencyLimits(1536, 24),
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks of a kernel on one SM.

    blocks_per_sm  resident at the same time; 0: the kernel cannot be launched
    limited_by     "threads", "blocks", "registers" or "shared memory"; the first of several in
                   this order: on an SM that is full, a kernel with fewer registers gains nothing
    warps_share    fraction of the SM's warps that these blocks occupy
    """

    blocks_per_sm: int
    limited_by: str
    warps_share: float


def get_limits(architecture: int) -> Limits:
    """Return the launch limits of a compute capability such as 80 or 90."""
    return LIMITS[architecture_name(divmod(architecture, 10))]


def compute_occupancy(architecture: int, registers: int, threads: int, shared: int) -> Occupancy:
    """Return the occupancy of a kernel.

    registers  of a thread
    threads    of a block
    shared     bytes of a block, static and dynamic
    """
    limits, launch_limits = RESIDENCY[architecture], get_limits(architecture)
    warps = -(-threads // WARP)
    warp_registers = _round_up(registers * WARP, REGISTERS_UNIT)
    warps_by_registers = REGISTERS // PARTITIONS // warp_registers * PARTITIONS
    blocks_by = {
        "threads": limits.threads // (warps * WARP) if threads <= MOST_THREADS else 0,
        "blocks": limits.blocks,
        "registers": warps_by_registers // warps if registers <= MOST_REGISTERS else 0,
        "shared memory": launch_limits.shared_sm // _round_up(shared + RESERVED, SHARED_UNIT)
        if shared <= launch_limits.shared
        else 0,
    }
    limited_by, blocks = min(blocks_by.items(), key=lambda item: item[1])
    return Occupancy(blocks, limited_by, blocks * warps * WARP / limits.threads)


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
