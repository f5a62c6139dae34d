"""Launchers of csrc/cuda/mvsplit_rmsnorm.cu: by clusters where a segment fits one, else by sweeps.

The choice is a computation of shared memory from the longest segment, D and the dtype; it does not
depend on the batch, so that a sample's result does not either.
"""

import functools
import itertools
import struct
from dataclasses import dataclass

import torch

from mvsplit_ops._cuda import rows
from mvsplit_ops._cuda.common import (
    SUM_ROWS,
    ceil_div,
    new,
    new_statistics,
    parameter,
    program,
    sum_rows,
    vector,
)
from mvsplit_ops._cuda.device import device_of
from mvsplit_ops._cuda.launch import Launch
from mvsplit_ops._host import blocks, dense, power_of_two, require_merge

MOST_SEGMENTS = 64  # as in mvsplit_rmsnorm.cu
THREADS = 256  # of a block; twice as many where no second block shares its SM
BARRIERS = 64  # bytes of mbarriers before everything else
MEANS_LANES = 8  # of sweep_means, each with a vector of columns
# Tensors that a block keeps, and blocks that shall share an SM: while one loads, another computes,
# and a third stores. The smallest cluster that leaves room for them is taken, for its blocks have
# the longest rows. Registers allow as many (80 and 118 of sm_90a at the paper's shape). Not yet
# measured on a GPU.
KEPT = {"forward": (2, 3), "backward": (3, 2)}
CLUSTERS = (1, 2, 4, 8, 16)
COPIES = {"plain": 0, "async": 1, "bulk": 2}  # as in cluster.cuh
# Bytes of a block's rows from which on a bulk copy brings each. At the paper's 128 bytes a block
# would issue 512 of them, one in eleven cycles of its share of the bandwidth, from uniform
# registers, where 16 bytes a thread are 128 instructions of a warp. Not yet measured on a GPU.
BULK_ROW = 512
KERNELS = {"forward": "cluster_fwd", "backward": "cluster_bwd"}
# Bytes that a thread may keep of each sum or mean of its columns: more would spill; backward with a
# weight, or element by element, more than half of it would.
MOST_COLUMNS = 64


@dataclass(frozen=True)
class Clusters:
    """How a cluster of `blocks` blocks of `threads` divides D.

    slice  columns of a block;  shared  its bytes;  copy  one of COPIES
    """

    blocks: int
    slice: int
    lanes: int
    items: int
    threads: int
    shared: int
    copy: int


def clusters(direction, Ts, D, width, itemsize, accumulator, limits, weighted=False):
    """The Clusters that hold segments of at most Ts tokens, the best first; none: [].

    Best is the smallest of those that let KEPT's blocks share an SM, then the largest of the rest.
    """
    tensors, resident = KEPT[direction]
    narrow = width == 1 or (weighted and direction == "backward")
    most = MOST_COLUMNS // 2 if narrow else MOST_COLUMNS
    shared_well, others = [], []
    for count in (n for n in CLUSTERS if n <= limits.cluster):
        columns = ceil_div(D, width * count) * width
        vectors = columns // width
        lanes = min(32, max(8, power_of_two(vectors)))
        items = ceil_div(vectors, lanes)
        kept = BARRIERS + tensors * (_align(Ts * columns * itemsize) + _align(Ts * accumulator))
        threads, sums = THREADS, THREADS // 32 * columns * accumulator
        if 2 * (kept + sums + 1024) > limits.shared_sm >= kept + 2 * sums + 1024:
            threads, sums = 2 * THREADS, 2 * sums
        shared = kept + sums
        if items * width * accumulator > most or shared > limits.shared:
            continue
        copy = "plain" if width * itemsize < 16 else "async"
        if copy == "async" and columns * itemsize >= BULK_ROW:
            copy = "bulk"
        plan = Clusters(count, columns, lanes, items, threads, shared, COPIES[copy])
        fits = (shared + 1024) * resident <= limits.shared_sm  # CUDA keeps 1 KB a block
        (shared_well if fits else others).append(plan)
    return shared_well + others[::-1]


def _align(size):
    return ceil_div(size, 16) * 16


def mvsplit_rmsnorm_fwd(x, f, alpha, beta, weight, jx, segments, eps, carry):
    B, T, D = x.shape
    S = len(segments)
    x, f, alpha, beta, weight, given = dense(x, f, alpha, beta, weight, jx)
    y, rstd = new(x, x.shape), new_statistics(x, B, T)
    jx = new_statistics(x, *(0,) if given is not None else (B, S, D))
    jf = new_statistics(x, B, S, D)
    jy = new_statistics(x, *(B, S, D) if carry else (0,))
    call = _Call("forward", (x, f, y, given), (alpha, beta, weight), segments, rstd, carry)
    means = None if given is not None else jx, jf, given, jy if carry else None
    tensors = x, f, None, y, None, rstd, *means
    if call.plan:
        call.by_cluster("forward", (*tensors, None), eps)
        return y, jy, rstd, jx, jf
    shift = new_statistics(x, B, S, D)
    partials = new_statistics(x, 1, B * call.blocks, D) if carry else None
    tensors = *tensors, shift, None, None, partials, None
    width = call.rows.width
    call.by_columns("sweep_means", MEANS_LANES * width, tensors, eps, values=2 * width)
    call.by_rows("sweep_apply", 2 + call.weighted, tensors, eps, sums=carry)
    if carry:
        call.by_columns("sweep_units", SUM_ROWS["columns"], tensors, eps)
    return y, jy, rstd, jx, jf


def mvsplit_rmsnorm_bwd(dy, kept, f, alpha, beta, weight, rstd, jx, jf, segments):
    require_merge(dy, kept, f, alpha, beta, weight, rstd, jx, jf, segments)
    B, T, D = dy.shape
    S, params = len(segments), 2 if weight is None else 3
    dy, kept, f, rstd, jx, jf = dense(dy, kept, f, rstd, jx, jf)
    alpha, beta, weight = dense(alpha, beta, weight)
    dx, df = new(dy, dy.shape), new(dy, dy.shape)
    tensors = dy, kept, f, dx, df, jx, jf
    call = _Call("backward", tensors, (alpha, beta, weight), segments, rstd)
    parts = new_statistics(dy, params, B * S, D)
    tensors = kept, f, dy, dx, df, rstd, jx, jf, None, None
    if call.plan:
        call.by_cluster("backward", (*tensors, parts), 0.0)
    else:
        jdz, mean = new_statistics(dy, B, S, D), new_statistics(dy, B, T)
        partials = new_statistics(dy, params, B * call.blocks, D)
        tensors = *tensors, None, jdz, mean, partials, parts
        call.by_rows("sweep_reduce", 1 + 3 * call.weighted, tensors, 0.0, sums=True)
        call.by_columns("sweep_units", SUM_ROWS["columns"], tensors, 0.0)
        call.by_rows("sweep_gradients", 3 + 2 * call.weighted, tensors, 0.0)
    dparams = sum_rows(parts, call.program)
    return dx, df, *dparams, *([] if weight is not None else [new_statistics(dy, 0)])


class _Call:
    """Plan and program of one call, and its launches."""

    def __init__(self, direction, tensors, parameters, segments, rstd, carry=False):
        x = tensors[0]
        self.B, self.T, self.D = x.shape
        self.segments, self.parameters = tuple(segments), parameters
        self.device, self.accumulator = device_of(x), rstd.element_size()
        self.weighted = parameters[2] is not None
        width = vector((*tensors, *parameters), self.D)
        self.program, self.plan, self.rows = _plan(
            self.device, direction, x.dtype, self.segments, self.D, width, self.weighted, carry
        )
        if self.rows:
            self.share = rows.rows_per_block(direction, self.B * self.T)
            self.blocks = blocks(segments, self.share)

    def by_cluster(self, direction, tensors, eps):
        """Clusters of the longest segment first: short ones fill what is left at the end."""
        plan = self.plan
        grid = self.B * len(self.segments) * plan.blocks
        launch = Launch(KERNELS[direction], grid, plan.threads, plan.blocks, plan.shared)
        numbers = plan.slice, max(self.segments)
        self._launch(launch, tensors, numbers, eps, _table(self.segments, longest_first=True))

    def by_rows(self, kernel, vectors, tensors, eps, sums=False):
        """Blocks of rows, with so many vectors of D in shared memory."""
        shared = self.rows.shared(self.D, self.accumulator, vectors, sums)
        rows.require_shared("mvsplit_rmsnorm", self.D, shared, self.device.limits)
        launch = Launch(kernel, self.B * self.blocks, self.rows.threads, shared=shared)
        self._launch(launch, tensors, (self.share, self.blocks), eps, _table(self.segments))

    def by_columns(self, kernel, columns, tensors, eps, values=1):
        """A block for so many columns of a segment; shared memory for each thread's `values`."""
        grid = self.B * len(self.segments) * ceil_div(self.D, columns)
        launch = Launch(kernel, grid, THREADS, shared=THREADS * values * self.accumulator)
        self._launch(launch, tensors, (self.share, self.blocks), eps, _table(self.segments))

    def _launch(self, launch, tensors, numbers, eps, table):
        fields = (field for p in self.parameters for field in parameter(p))
        sizes = self.B, self.T, self.D, len(self.segments)
        args = *tensors, *fields, *sizes, *numbers, eps, table
        self.device.launch(self.program, launch, args)


@functools.lru_cache(maxsize=4096)
def _plan(device, direction, dtype, segments, D, width, weighted, carry):
    """(Program, Clusters or None, Rows or None): clusters where they fit and can be resident."""
    if len(segments) > MOST_SEGMENTS:
        raise ValueError(
            f"mvsplit_rmsnorm: backend 'cuda' takes at most {MOST_SEGMENTS} segments, "
            f"got {len(segments)}; pass backend='triton'"
        )
    accumulator = 8 if dtype == torch.float64 else 4
    flags = {"WEIGHT": int(weighted), "CARRY": int(carry)}
    sizes = width, dtype.itemsize, accumulator
    for plan in clusters(direction, max(segments), D, *sizes, device.limits, weighted):
        layout = {"VEC": width, "LANES": plan.lanes, "ITEMS": plan.items, "THREADS": plan.threads}
        layout |= {"BACKWARD": int(direction == "backward"), "COPY": plan.copy}
        made = program("mvsplit_rmsnorm", dtype, CLUSTER=1, **layout, **flags)
        one = Launch(KERNELS[direction], plan.blocks, plan.threads, plan.blocks, plan.shared)
        if device.holds(made, one):  # a slice of a GPU may not, nor a small one 16 blocks
            return made, plan, None
    layout = rows.layout(direction, D, accumulator, width)
    flags["BRANCH"] = int(weighted)
    made = program("mvsplit_rmsnorm", dtype, CLUSTER=0, **layout.defines, SCALE=1, **flags)
    return made, None, layout


@functools.lru_cache(maxsize=4096)
def _table(segments, longest_first=False):
    """The `Segment`s of a kernel's arguments."""
    ends = list(itertools.accumulate(segments))
    places = [(end - n, end, i, 0) for i, (n, end) in enumerate(zip(segments, ends, strict=True))]
    if longest_first:
        places.sort(key=lambda place: place[0] - place[1])
    packed = struct.pack(f"{4 * len(places)}i", *itertools.chain(*places))
    return packed.ljust(16 * MOST_SEGMENTS, b"\0")
