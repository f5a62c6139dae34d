"""What the kernels and launchers share: where Triton runs, a launch, the sum of partial rows."""

import torch
import triton
import triton.language as tl

from mvsplit_ops._host import accumulator, ceil_div, new

# Triton decides at import whether kernels are interpreted, on CPU tensors, or compiled.
INTERPRETED = triton.knobs.runtime.interpret
OLDEST = (3, 5)


def missing(device_type):
    """Why Triton's kernels cannot run on tensors of a device type; None when they can."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        needed, found = ".".join(map(str, OLDEST)), triton.__version__
        return f"Triton {needed} or newer is needed, found {found}; run pip install -U triton"
    if device_type == "cpu" and not INTERPRETED:
        return "CPU tensors need Triton's interpreter; set TRITON_INTERPRET=1 before Python starts"
    return None


def launch(kernel, programs, like, *args, **options):
    """Run `programs` instances of a kernel on the device of the tensor `like`, on its stream."""
    if programs == 0:
        return
    options["enable_fp_fusion"] = True  # a * b + c rounds once
    if like.is_cuda and like.get_device() != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            kernel[(programs,)](*args, **options)
    else:
        kernel[(programs,)](*args, **options)


def new_statistics(like, *shape):
    return new(like, shape, accumulator(like.dtype))


def sum_rows(partials):
    """(outputs, rows, width) -> (width,) for each output: sums over the rows, in a fixed order.

    Programs own 16 columns, so that even the 128 columns of a head weight occupy several of them;
    64 bytes of a row are two whole sectors of DRAM.
    """
    outputs, rows, width = partials.shape
    sums = [new(partials, (width,)) for _ in range(outputs)]
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
    """Columns d of a (rows, width) array summed over its rows, ROWS at a time."""
    total = tl.zeros((ROWS, d.shape[0]), partials.dtype.element_ty)
    for first in range(0, rows, ROWS):
        r = first + tl.arange(0, ROWS)[:, None]
        inside = (r < rows) & (d < width)[None, :]
        at = partials + r.to(tl.int64) * width + d[None, :]
        total += tl.load(at, inside, other=0, cache_modifier=".cg")  # from L2, where others wrote
    return tl.sum(total, 0)


@triton.jit
def wide(t):
    """t in the dtype of arithmetic: fp32, or fp64 as it is."""
    if t.dtype == tl.float64:
        return t
    else:
        return t.to(tl.float32)
