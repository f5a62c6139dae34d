"""Helpers of all kernels and launchers: availability, launching, sums over many rows.

Sums: values need not average out (equal tokens of a collapsed block, constant gradients), and then
the error of a plain sum grows with the number of terms. tl.sum adds the elements of a tile as a
tree. A loop adds at most PLAIN_TILES tiles one after another; the sums of such blocks, and partial
rows, are added in float64. Neighbouring tokens are added first: of values whose signs alternate,
other orders add many with one sign, and their rounding errors do not cancel.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit_ops._host import ceil_div, new_empty

# Triton decides at import whether it compiles kernels or interprets them, on CPU tensors.
INTERPRETED = triton.knobs.runtime.interpret
OLDEST_TRITON = (3, 5)
PLAIN_TILES = tl.constexpr(16)


def find_missing(device_type: str) -> str | None:
    """Return why the kernels cannot run on tensors of a device type, or None if they can."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return (
            f"Triton must be {oldest} or newer, got {triton.__version__}; "
            "run pip install --upgrade triton"
        )
    if device_type == "cpu" and not INTERPRETED:
        return "CPU tensors need Triton's interpreter; set TRITON_INTERPRET=1 before Python starts"
    return None


def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **options: Any) -> None:
    """Run `programs` instances of a kernel on the current stream of the device of `like`."""
    if programs == 0:
        return
    options["enable_fp_fusion"] = True  # a * b + c rounds once
    if like.is_cuda and like.get_device() != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            kernel[(programs,)](*args, **options)
    else:
        kernel[(programs,)](*args, **options)


def sum_rows(partials: Tensor) -> list[Tensor]:
    """Return the sums over the rows of (outputs, rows, width): a (width,) tensor for each output.

    The order is fixed. A program owns 16 columns, so that even the 128 columns of a head weight
    occupy several programs; 64 bytes of a row are two whole sectors of DRAM.
    """
    outputs, rows, width = partials.shape
    sums = [new_empty(partials, (width,)) for _ in range(outputs)]
    programs = outputs * ceil_div(width, 16)
    launch(_sum_rows, programs, partials, partials, tuple(sums), rows, width, ROWS=128, COLUMNS=16)
    return sums


@triton.jit(do_not_specialize=["rows"])
def _sum_rows(partials, sums, rows, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    slices = tl.cdiv(width, COLUMNS)
    output = tl.program_id(0) // slices
    d = (tl.program_id(0) % slices) * COLUMNS + tl.arange(0, COLUMNS)
    total = column_sum(partials + output.to(tl.int64) * rows * width, rows, d, width, ROWS)
    for i in tl.static_range(len(sums)):
        if output == i:
            tl.store(sums[i] + d, total, d < width)


@triton.jit
def column_sum(partials, rows, d, width: tl.constexpr, ROWS: tl.constexpr):
    """Return the sums, in float64, of columns d of a (rows, width) array, ROWS rows at a time."""
    total = tl.zeros((d.shape[0],), tl.float64)
    for first in range(0, rows, ROWS):
        r = first + tl.arange(0, ROWS)[:, None]
        inside = (r < rows) & (d < width)[None, :]
        at = partials + r.to(tl.int64) * width + d[None, :]
        tile = tl.load(at, inside, other=0, cache_modifier=".cg")  # L2, not a stale line of L1
        total += tl.sum(tile.to(tl.float64), 0)
    return total


@triton.jit
def mean_of(total, count):
    """Return total / count for a float64 sum; the mean of equal float32 values is exact."""
    return total * (1.0 / count.to(tl.float64))


@triton.jit
def wide(t):
    """Return t in the dtype of arithmetic: fp32, or fp64 if it is fp64."""
    if t.dtype == tl.float64:
        return t
    else:
        return t.to(tl.float32)
