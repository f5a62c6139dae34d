"""Launchers of csrc/cuda/mvsplit_rmsnorm.cu: by clusters if a segment fits in one, else by sweeps.

The choice depends only on the longest segment, D and the dtype, by the shared memory that they
need. It does not depend on the batch, so the result of a sample does not either.
"""

import functools
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mvsplit_ops._cuda.common import (
    SUM_COLUMNS,
    choose_vector,
    make_program,
    new_empty,
    new_statistics,
    sum_rows,
    to_parameter_fields,
)
from mvsplit_ops._cuda.device import device_of
from mvsplit_ops._cuda.launch import Argument, Device, Launch, Limits, Program
from mvsplit_ops._cuda.rows import Rows, lay_out_rows, require_shared, rows_per_block
from mvsplit_ops._host import (
    MOST_SEGMENTS,
    ceil_div,
    count_blocks,
    next_power_of_two,
    require_merge,
    to_contiguous,
)

MOST_TOKENS = 2**31 - 1  # of a sample: the table of segments has 32-bit integers
RUN = 16  # as in common.cuh
MERGE_THREADS = 256  # of a block; twice as many if no second block shares its SM
BARRIERS = 64  # bytes of mbarriers at the beginning of shared memory
MEANS_LANES, MEANS_ROWS = 8, 32  # of sweep_means: vectors of columns, and rows at the same time
# {direction: (tensors that a block holds, blocks that should share an SM)}: while one block loads,
# another computes and a third stores. The smallest cluster that leaves room for them is chosen,
# because its blocks have the longest rows. Registers allow as many blocks (80 and 118 of sm_90a at
# the paper's shape). Not yet measured on a GPU.
CLUSTER_OCCUPANCY = {"forward": (2, 3), "backward": (3, 2)}
CLUSTER_SIZES = (1, 2, 4, 8, 16)
COPIES = {"plain": 0, "async": 1, "bulk": 2}  # as in cluster.cuh
# Fewest bytes of a block's row for a bulk copy. At the paper's 128 bytes a block would issue 512 of
# them, one in eleven cycles of its share of the bandwidth, from uniform registers; copies of 16
# bytes per thread are 128 instructions of a warp. Not yet measured on a GPU.
BULK_ROW = 512
CLUSTER_KERNELS = {"forward": "cluster_fwd", "backward": "cluster_bwd"}
# Most bytes that a thread holds of each sum or mean of its columns; more would spill. Backward with
# a weight, or element by element, half of it.
MOST_COLUMN_BYTES = 64


@dataclass(frozen=True)
class Clusters:
    """Division of D by a cluster of `blocks` blocks of `threads`.

    slice  columns of a block;  shared  its bytes of shared memory;  copy  one of COPIES
    """

    blocks: int
    slice: int
    lanes: int
    items: int
    threads: int
    shared: int
    copy: int


def list_clusters(
    direction: str,
    Ts: int,
    D: int,
    sizes: tuple[int, int, int],
    limits: Limits,
    weighted: bool = False,
) -> list[Clusters]:
    """Return the Clusters that hold segments of at most Ts tokens, the best first.

    sizes: elements of an access, bytes of an element, bytes of an accumulator.
    The best is the smallest of those that let the blocks of CLUSTER_OCCUPANCY share an SM; after
    these come the others, the largest first.
    """
    width, itemsize, accumulator = sizes
    tensors, resident = CLUSTER_OCCUPANCY[direction]
    narrow = width == 1 or (weighted and direction == "backward")
    most = MOST_COLUMN_BYTES // 2 if narrow else MOST_COLUMN_BYTES
    sharing: list[Clusters] = []
    others: list[Clusters] = []
    for count in (n for n in CLUSTER_SIZES if n <= limits.cluster):
        columns = ceil_div(D, width * count) * width
        vectors = columns // width
        lanes = min(32, max(8, next_power_of_two(vectors)))
        items = ceil_div(vectors, lanes)
        data = BARRIERS + tensors * (_align(Ts * columns * itemsize) + _align(Ts * accumulator))
        threads, sums = MERGE_THREADS, MERGE_THREADS // 32 * columns * accumulator
        if 2 * (data + sums + 1024) > limits.shared_sm >= data + 2 * sums + 1024:
            threads, sums = 2 * MERGE_THREADS, 2 * sums
        shared = data + sums
        if items * width * accumulator > most or shared > limits.shared:
            continue
        copy = "plain" if width * itemsize < 16 else "async"
        if copy == "async" and columns * itemsize >= BULK_ROW:
            copy = "bulk"
        plan = Clusters(count, columns, lanes, items, threads, shared, COPIES[copy])
        fits = (shared + 1024) * resident <= limits.shared_sm  # CUDA reserves 1 KB per block
        (sharing if fits else others).append(plan)
    return sharing + others[::-1]


def _align(size: int) -> int:
    return ceil_div(size, 16) * 16


def mvsplit_rmsnorm_fwd(
    x: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    jx: Tensor | None,
    segments: Sequence[int],
    eps: float,
    carry: bool,
) -> tuple[Tensor, ...]:
    B, T, D = x.shape
    S = len(segments)
    x, f, alpha, beta = to_contiguous(x, f, alpha, beta)
    weight, input_jx = to_contiguous(weight, jx)
    y, rstd = new_empty(x, x.shape), new_statistics(x, B, T)
    new_jx = new_statistics(x, *(0,) if input_jx is not None else (B, S, D))
    jf = new_statistics(x, B, S, D)
    jy = new_statistics(x, *(B, S, D) if carry else (0,))
    others = f, y, input_jx
    call = _MergeCall("forward", x, others, (alpha, beta, weight), segments, rstd, carry)
    means = None if input_jx is not None else new_jx, jf, input_jx, jy if carry else None
    tensors = x, f, None, y, None, rstd, *means
    plan = call.plan
    if isinstance(plan, Clusters):
        call.launch_clusters(plan, "forward", (*tensors, None), eps)
        return y, jy, rstd, new_jx, jf
    shift = new_statistics(x, B, S, D)
    partials = new_statistics(x, 1, B * call.blocks, D) if carry else None
    sweep = *tensors, shift, None, None, partials, None
    total = 8 if _is_long(call.segments, MEANS_ROWS) or x.element_size() > 2 else 4
    columns, shared = MEANS_LANES * plan.width, 2 * plan.width * total
    call.launch_columns("sweep_means", columns, sweep, eps, shared)
    vectors = 2 + (x.element_size() > 2) + call.weighted
    call.launch_rows(plan, "sweep_apply", vectors, sweep, eps, sums=carry)
    if carry:
        call.launch_columns("sweep_units", SUM_COLUMNS, sweep, eps, call.accumulator)
    return y, jy, rstd, new_jx, jf


def mvsplit_rmsnorm_bwd(
    dy: Tensor,
    saved: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    jx: Tensor,
    jf: Tensor,
    segments: Sequence[int],
) -> tuple[Tensor, ...]:
    require_merge(dy, saved, f, (alpha, beta, weight), rstd, (jx, jf), segments)
    B, T, D = dy.shape
    S, params = len(segments), 2 if weight is None else 3
    dy, saved, f, rstd, jx, jf, alpha, beta = to_contiguous(dy, saved, f, rstd, jx, jf, alpha, beta)
    (weight,) = to_contiguous(weight)
    dx, df = new_empty(dy, dy.shape), new_empty(dy, dy.shape)
    others = saved, f, dx, df, jx, jf
    call = _MergeCall("backward", dy, others, (alpha, beta, weight), segments, rstd)
    parts = new_statistics(dy, params, B * S, D)
    tensors = saved, f, dy, dx, df, rstd, jx, jf, None, None
    plan = call.plan
    if isinstance(plan, Clusters):
        call.launch_clusters(plan, "backward", (*tensors, parts), 0.0)
    else:
        jdz, mean = new_statistics(dy, B, S, D), new_statistics(dy, B, T)
        partials = new_statistics(dy, params, B * call.blocks, D)
        sweep = *tensors, None, jdz, mean, partials, parts
        call.launch_rows(plan, "sweep_reduce", 1 + 3 * call.weighted, sweep, 0.0, sums=True)
        call.launch_columns("sweep_units", SUM_COLUMNS, sweep, 0.0, call.accumulator)
        call.launch_rows(plan, "sweep_gradients", 3 + 2 * call.weighted, sweep, 0.0)
    dparams = sum_rows(parts, call.program)
    return dx, df, *dparams, *([] if weight is not None else [new_statistics(dy, 0)])


class _MergeCall:
    """Plan and program of one call, and its launches."""

    def __init__(
        self,
        direction: str,
        x: Tensor,
        others: tuple[Tensor | None, ...],
        parameters: tuple[Tensor, Tensor, Tensor | None],
        segments: Sequence[int],
        rstd: Tensor,
        carry: bool = False,
    ) -> None:
        self.B, self.T, self.D = x.shape
        self.segments, self.parameters = tuple(segments), parameters
        self.device, self.accumulator = device_of(x), rstd.element_size()
        self.weighted = parameters[2] is not None
        width = choose_vector((x, *others, *parameters), self.D)
        self.program, self.plan = _choose_plan(
            self.device, direction, x.dtype, self.segments, self.D, width, self.weighted, carry
        )
        if isinstance(self.plan, Rows):
            summed = carry or direction == "backward"
            # Sums of a sample must not depend on the batch.
            rows = self.T if summed else self.B * self.T
            self.share = rows_per_block(self.plan, rows, summed)
            self.blocks = count_blocks(segments, self.share)

    def launch_clusters(
        self, plan: Clusters, direction: str, tensors: Sequence[Argument], eps: float
    ) -> None:
        """Launch clusters of the longest segment first: short ones fill what is left at the end."""
        grid = self.B * len(self.segments) * plan.blocks
        launch = Launch(CLUSTER_KERNELS[direction], grid, plan.threads, plan.blocks, plan.shared)
        numbers = plan.slice, max(self.segments)
        self._launch(launch, tensors, numbers, eps, _pack_segments(self.segments, True))

    def launch_rows(
        self,
        rows: Rows,
        kernel: str,
        vectors: int,
        tensors: Sequence[Argument],
        eps: float,
        sums: bool = False,
    ) -> None:
        """Launch blocks of rows that hold so many vectors of D in shared memory."""
        shared = rows.count_shared(self.D, self.accumulator, vectors, sums)
        require_shared("mvsplit_rmsnorm", self.D, shared, self.device.limits)
        launch = Launch(kernel, self.B * self.blocks, rows.threads, shared=shared)
        numbers = self.share, self.blocks
        self._launch(launch, tensors, numbers, eps, _pack_segments(self.segments))

    def launch_columns(
        self, kernel: str, columns: int, tensors: Sequence[Argument], eps: float, shared: int
    ) -> None:
        """Launch a block for so many columns of a segment; shared: bytes per thread to exchange."""
        grid = self.B * len(self.segments) * ceil_div(self.D, columns)
        launch = Launch(kernel, grid, MERGE_THREADS, shared=MERGE_THREADS * shared)
        numbers = self.share, self.blocks
        self._launch(launch, tensors, numbers, eps, _pack_segments(self.segments))

    def _launch(
        self,
        launch: Launch,
        tensors: Sequence[Argument],
        numbers: tuple[int, int],
        eps: float,
        table: bytes,
    ) -> None:
        fields = (field for p in self.parameters for field in to_parameter_fields(p))
        sizes = self.B, self.T, self.D, len(self.segments)
        args = *tensors, *fields, *sizes, *numbers, eps, table
        self.device.launch(self.program, launch, args)


def _is_long(segments: Sequence[int], rows: int) -> bool:
    """Return whether a thread of a block that works on `rows` rows at once adds more than RUN."""
    return max(segments) > RUN * rows


@functools.lru_cache(maxsize=4096)
def _choose_plan(
    device: Device,
    direction: str,
    dtype: torch.dtype,
    segments: tuple[int, ...],
    D: int,
    width: int,
    weighted: bool,
    carry: bool,
) -> tuple[Program, Clusters | Rows]:
    """Return the Program, and Clusters if they fit and can be resident, else Rows."""
    if len(segments) > MOST_SEGMENTS or sum(segments) > MOST_TOKENS:
        raise RuntimeError(
            f"mvsplit_ops: segments must be at most {MOST_SEGMENTS}, of {MOST_TOKENS} tokens in "
            f"total, got {len(segments)} of {sum(segments)}; pass backend='triton'"
        )
    accumulator = 8 if dtype == torch.float64 else 4
    flags = {"WEIGHT": int(weighted), "CARRY": int(carry)}
    sizes = width, dtype.itemsize, accumulator
    for plan in list_clusters(direction, max(segments), D, sizes, device.limits, weighted):
        layout = {"VEC": width, "LANES": plan.lanes, "ITEMS": plan.items, "THREADS": plan.threads}
        layout |= {"BACKWARD": int(direction == "backward"), "COPY": plan.copy}
        long = _is_long(segments, plan.threads // plan.lanes)
        program = make_program(
            "mvsplit_rmsnorm", dtype, CLUSTER=1, **layout, **flags, LONG=int(long)
        )
        kernel = CLUSTER_KERNELS[direction]
        one = Launch(kernel, plan.blocks, plan.threads, plan.blocks, plan.shared)
        if device.holds(program, one):  # a slice of a GPU, or a small one, may not hold 16 blocks
            return program, plan
    rows = lay_out_rows(direction, D, accumulator, width)
    flags |= {"BRANCH": int(weighted), "LONG": int(_is_long(segments, MEANS_ROWS))}
    program = make_program("mvsplit_rmsnorm", dtype, CLUSTER=0, **rows.defines, SCALE=1, **flags)
    return program, rows


@functools.lru_cache(maxsize=4096)
def _pack_segments(segments: tuple[int, ...], longest_first: bool = False) -> bytes:
    """Return the table of `Segment`s at the end of a kernel's arguments."""
    ends = list(itertools.accumulate(segments))
    places = [(end - n, end, i, 0) for i, (n, end) in enumerate(zip(segments, ends, strict=True))]
    if longest_first:
        places.sort(key=lambda place: place[0] - place[1])
    packed = struct.pack(f"{4 * len(places)}i", *itertools.chain(*places))
    return packed.ljust(16 * MOST_SEGMENTS, b"\0")
