"""Helpers of all launchers: allocation, programs, vector widths, sums of partial rows."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mvsplit_ops import _host
from mvsplit_ops._cuda.device import device_of
from mvsplit_ops._cuda.launch import Argument, Launch, Program
from mvsplit_ops._host import accumulator_dtype, ceil_div

CUDA_TYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float",
    torch.float64: "double",
}
SUM_COLUMNS, SUM_THREADS = 32, 256  # of a block of sum_rows


def new_empty(like: Tensor, shape: Sequence[int] | int, dtype: torch.dtype | None = None) -> Tensor:
    """Return a new tensor like `like`; an emulator fills it with NaN, to find unset values."""
    t = _host.new_empty(like, shape, dtype)
    return t if t.is_cuda else device_of(t).poison(t)


def new_statistics(like: Tensor, *shape: int) -> Tensor:
    return new_empty(like, shape, accumulator_dtype(like.dtype))


@functools.lru_cache(maxsize=4096)
def make_program(source: str, dtype: torch.dtype, **defines: int) -> Program:
    """Return the Program for activations of a dtype."""
    named = {"DTYPE": CUDA_TYPES[dtype], **defines}
    return Program(source, tuple(f"{name}={value}" for name, value in named.items()))


def choose_vector(tensors: Sequence[Tensor | None], *lengths: int) -> int:
    """Return the number of elements of one access.

    It is 16 bytes of the first tensor, or fewer if a length or the address of a tensor is not a
    multiple of that. A tensor of a wider dtype takes several accesses of 16 bytes.
    """
    present = [t for t in tensors if t is not None]
    n = math.gcd(16 // present[0].element_size(), *lengths)
    addresses = [t.data_ptr() for t in present]
    if any(address % 16 for address in addresses):
        for address, t in zip(addresses, present, strict=True):
            while address % min(16, n * t.element_size()):
                n //= 2
    return n


def to_parameter_fields(p: Tensor | None) -> tuple[Tensor | None, bool]:
    """Return the fields of a kernel's `Parameter`: its address, and if it is narrower than fp32."""
    return p, p is not None and p.dtype != torch.float32


def sum_rows(partials: Tensor, program: Program) -> list[Tensor]:
    """Return the sums over the rows of (outputs, rows, width): a (width,) tensor for each output.

    The kernel sum_rows of `program` adds them in a fixed order; it takes at most three outputs.
    """
    outputs, rows, width = partials.shape
    sums = [new_empty(partials, (width,)) for _ in range(outputs)]
    grid = outputs * ceil_div(width, SUM_COLUMNS)
    shared = SUM_THREADS * partials.element_size()
    padding: tuple[Argument, ...] = (None,) * (3 - outputs)
    device_of(partials).launch(
        program,
        Launch("sum_rows", grid, SUM_THREADS, shared=shared),
        (partials, *sums, *padding, rows, width),
    )
    return sums
