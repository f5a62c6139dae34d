"""What a kernel is launched on: a GPU (gpu.py), or a stand-in that a test installs.

Launchers say Program (what to compile), Launch (how many threads) and arguments; a device does the
rest. Arguments are packed the same way for every device: eight bytes each, in the order of the
fields of the kernel's `struct Args`.
"""

import struct
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Program:
    """csrc/cuda/<source>.cu compiled with -D<define> for each of `defines`."""

    source: str
    defines: tuple[str, ...]  # e.g. ("DTYPE=bfloat16", "VEC=8")


@dataclass(frozen=True)
class Launch:
    """`grid` blocks of `block` threads, `cluster` of them together, with `shared` bytes each."""

    kernel: str
    grid: int
    block: int
    cluster: int = 0  # 0: the kernel knows nothing of clusters
    shared: int = 0


@dataclass(frozen=True)
class Limits:
    """What a launch may ask for.

    architecture  as compilers are told it: "sm_80", "sm_90a", "sm_100a"
    shared        bytes of shared memory of a block, at most;  shared_sm  of all blocks of an SM
    cluster       blocks of a cluster, at most; 0: there are no clusters
    """

    architecture: str
    shared: int
    shared_sm: int
    cluster: int


# Of architectures that need not be here: CUDA C++ Programming Guide, compute capabilities.
LIMITS = {
    limits.architecture: limits
    for limits in (
        Limits("sm_80", shared=163 << 10, shared_sm=164 << 10, cluster=0),
        Limits("sm_86", shared=99 << 10, shared_sm=100 << 10, cluster=0),
        Limits("sm_89", shared=99 << 10, shared_sm=100 << 10, cluster=0),
        Limits("sm_90a", shared=227 << 10, shared_sm=228 << 10, cluster=16),
        Limits("sm_100a", shared=227 << 10, shared_sm=228 << 10, cluster=16),
        Limits("sm_120a", shared=99 << 10, shared_sm=100 << 10, cluster=8),
    )
}


class Device(Protocol):
    limits: Limits

    def holds(self, program: Program, launch: Launch) -> bool:
        """Whether a cluster of this launch can be resident at all."""

    def launch(self, program: Program, launch: Launch, args: tuple) -> None:
        """Run the kernel on the current stream of the device of the tensors in `args`."""

    def poison(self, t: torch.Tensor) -> torch.Tensor:
        """A new tensor, as a stand-in wants it to begin; not asked of a GPU."""


def pack(args, address=torch.Tensor.data_ptr):
    """The bytes of `struct Args`: 8 for a tensor (its address), None (0), int, bool or float.

    bytes stand for themselves: a table at the end of the struct.
    """
    try:
        codes = "".join([_CODES[type(value)] for value in args])
    except KeyError:  # a subclass of Tensor
        codes = "".join(["P" if isinstance(v, torch.Tensor) else _CODES[type(v)] for v in args])
    values = [
        address(value) if code == "P" else 0 if value is None else value
        for code, value in zip(codes, args, strict=True)
    ]
    if codes[-1] == "s":
        return struct.pack(codes[:-1], *values[:-1]) + values[-1]
    return struct.pack(codes, *values)


_CODES = {
    **dict.fromkeys((torch.Tensor, torch.nn.Parameter), "P"),
    **dict.fromkeys((int, bool, type(None)), "q"),
    **{float: "d", bytes: "s"},
}
