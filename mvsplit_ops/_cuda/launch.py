"""The launch of a kernel: the program, the threads, the packed arguments, the limits of a device.

A launcher passes a Program (what to compile), a Launch (how many threads) and arguments to a
Device: a GPU (gpu.py), or an emulator that a test installs. Arguments are packed the same way for
every device: eight bytes each, in the order of the fields of the kernel's `struct Args`.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Argument = Tensor | int | float | bytes | None


@dataclass(frozen=True)
class Program:
    """csrc/cuda/<source>.cu compiled with -D<define> for each of `defines`."""

    source: str
    defines: tuple[str, ...]  # e.g. ("DTYPE=bfloat16", "VEC=8")


@dataclass(frozen=True)
class Launch:
    """`grid` blocks of `block` threads in clusters of `cluster`, with `shared` bytes per block."""

    kernel: str
    grid: int
    block: int
    cluster: int = 0  # 0: the kernel does not use clusters
    shared: int = 0


@dataclass(frozen=True)
class Limits:
    """The most that a launch may ask of a device.

    architecture  as compilers name it: "sm_80", "sm_90a", "sm_100a"
    shared        bytes of shared memory of a block;  shared_sm  of all blocks of an SM
    cluster       blocks of a cluster; 0: the device has no clusters
    """

    architecture: str
    shared: int
    shared_sm: int
    cluster: int


# Limits without the GPU itself. Source: CUDA C++ Programming Guide, compute capabilities.
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
    """What launches kernels."""

    limits: Limits

    def holds(self, program: Program, launch: Launch) -> bool:
        """Return whether the device has room for one cluster of this launch."""

    def launch(self, program: Program, launch: Launch, args: Sequence[Argument]) -> None:
        """Run the kernel on the current stream of the device of the tensors in `args`."""

    def poison(self, t: Tensor) -> Tensor:
        """Return a new tensor, which an emulator fills with NaN; a GPU is not asked."""

    def __hash__(self) -> int: ...


def pack(args: Sequence[Any], address: Callable[[Tensor], int] = Tensor.data_ptr) -> bytes:
    """Return the bytes of `struct Args`: 8 for a tensor (its address), None (0), int, bool, float.

    A value of type bytes is copied as it is: a table at the end of the struct.
    """
    try:
        codes = "".join([_CODES[type(value)] for value in args])
    except KeyError:  # a subclass of Tensor
        codes = "".join(["P" if isinstance(v, Tensor) else _CODES[type(v)] for v in args])
    values: list[Any] = [
        address(value) if code == "P" else 0 if value is None else value
        for code, value in zip(codes, args, strict=True)
    ]
    if codes[-1] == "s":
        return struct.pack(codes[:-1], *values[:-1]) + values[-1]
    return struct.pack(codes, *values)


_CODES: dict[type, str] = {
    **dict.fromkeys((Tensor, torch.nn.Parameter), "P"),
    **dict.fromkeys((int, bool, type(None)), "q"),
    **{float: "d", bytes: "s"},
}
