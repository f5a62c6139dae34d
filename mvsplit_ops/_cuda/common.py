"""What the launchers share: allocation, vector widths, defines, the sum of partial rows."""

import functools
import math

import torch

from mvsplit_ops import _host
from mvsplit_ops._cuda.device import device_of
from mvsplit_ops._cuda.launch import Launch, Program
from mvsplit_ops._host import accumulator, ceil_div

CUDA_TYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float",
    torch.float64: "double",
}
SUM_ROWS = {"columns": 32, "threads": 256}


def new(like, shape, dtype=None):
    """A tensor on the device of `like`; NaN where a stand-in for a GPU looks for what is unset."""
    t = _host.new(like, shape, dtype)
    return t if t.is_cuda else device_of(t).poison(t)


def new_statistics(like, *shape):
    return new(like, shape, accumulator(like.dtype))


@functools.lru_cache(maxsize=4096)
def program(source, dtype, **defines):
    """The Program for activations of a dtype."""
    named = {"DTYPE": CUDA_TYPES[dtype], **defines}
    return Program(source, tuple(f"{name}={value}" for name, value in named.items()))


def vector(tensors, *lengths):
    """Elements of one access: the first tensor's in 16 bytes, fewer where a length or the place of
    a tensor is no multiple of it. A tensor of a wider dtype takes several accesses of 16 bytes.
    """
    tensors = [t for t in tensors if t is not None]
    n = math.gcd(16 // tensors[0].element_size(), *lengths)
    addresses = [t.data_ptr() for t in tensors]
    if any(address % 16 for address in addresses):
        for address, t in zip(addresses, tensors, strict=True):
            while address % min(16, n * t.element_size()):
                n //= 2
    return n


def parameter(p):
    """The two fields of a `Parameter`: its address, and whether it is narrower than float32."""
    return p, p is not None and p.dtype != torch.float32


def sum_rows(partials, source):
    """(outputs, rows, width) -> (width,) for each output: sums over the rows, in a fixed order.

    By the kernel of that name in the program `source`; three outputs at most.
    """
    outputs, rows, width = partials.shape
    sums = [new(partials, (width,)) for _ in range(outputs)]
    grid = outputs * ceil_div(width, SUM_ROWS["columns"])
    threads = SUM_ROWS["threads"]
    device_of(partials).launch(
        source,
        Launch("sum_rows", grid, threads, shared=threads * partials.element_size()),
        (partials, *sums, *(None,) * (3 - outputs), rows, width),
    )
    return sums
