"""The tokens of a segment, for any number of segments.

Kernels take the ends of the segments as a tuple of integers, 2 * end + 1 each: Triton compiles a
kernel again for an integer argument that is 1 or a multiple of 16, and captions have any length.
"""

import itertools
from collections.abc import Sequence

import triton
import triton.language as tl

from mvsplit_ops.triton_kernels._common import column_sum, mean_of


def encode_ends(segments: Sequence[int]) -> tuple[int, ...]:
    """Return 2 * end + 1 for each segment."""
    return tuple(2 * end + 1 for end in itertools.accumulate(segments))


@triton.jit
def block_tokens(block, ends, share):
    """Return (segment, first token, token after the last) of a block of a sample."""
    segment, begin, stop = 0, 0, 0
    start, first = 0, 0
    for s in tl.static_range(len(ends)):
        end = ends[s] >> 1
        count = tl.cdiv(end - start, share)
        inside = (block >= first) & (block < first + count)
        segment = tl.where(inside, s, segment)
        begin = tl.where(inside, start + (block - first).to(end.dtype) * share, begin)
        stop = tl.where(inside, end, stop)
        start, first = end, first + count
    return segment, begin, tl.minimum(begin + share, stop)


@triton.jit
def segment_tokens(segment, ends, share):
    """Return (first token, token after the last, first block, number of blocks) of a segment."""
    begin, stop, block, blocks = 0, 0, 0, 0
    start, first = 0, 0
    for s in tl.static_range(len(ends)):
        end = ends[s] >> 1
        count = tl.cdiv(end - start, share)
        begin = tl.where(segment == s, start, begin)
        stop = tl.where(segment == s, end, stop)
        block = tl.where(segment == s, first, block)
        blocks = tl.where(segment == s, count, blocks)
        start, first = end, first + count
    return begin, stop, block, blocks


@triton.jit
def add_up_last(
    partials, tickets, jys, unit, base, segment, ends, share, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """In the last program of a segment to finish, add up the rows that its programs stored."""
    begin, end, first, total = segment_tokens(segment, ends, share)
    tl.debug_barrier()  # all threads have stored before one of them takes a ticket
    if tl.atomic_add(tickets + unit, 1, sem="acq_rel") == total - 1:
        d = tl.arange(0, BLOCK_D)
        rows = partials + (base + first).to(tl.int64) * D
        jy = mean_of(column_sum(rows, total, d, D, 4), end - begin)
        tl.store(jys + unit.to(tl.int64) * D + d, jy, d < D)
