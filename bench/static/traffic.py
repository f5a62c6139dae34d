"""Bytes that an operator moves, counted instead of timed: no GPU is needed.

    reference   every tensor that an eager PyTorch operation reads or writes
    cpu         the tensors that go into the C++ kernel and come out of it; what it reads twice
                comes from cache
    triton      every byte that the kernels load and store, read off Triton's interpreter, and every
                tensor that their launchers give to PyTorch operations
    cuda        the same, read off tests/simt
    published   the same as triton of a checkout of erwold/mv-split, of the operators that it has

A pass is one reading or writing of a (B, T, D) activation. On a GPU some of the bytes come from L2;
the count is what the kernel asks for.
"""

import contextlib
from dataclasses import asdict, dataclass, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import CASES, calls_per_step
from bench.common import options as opt
from bench.common import records, text_tables
from bench.common.accuracy import results_and_gradients
from bench.common.machine import describe_run
from bench.measure import implementations
from bench.static import cuda_emulator, triton_interpreter
from bench.static.byte_counter import Traffic, stored_bytes, tensors_in
from mvsplit_ops import _backends

# PyTorch operations that move nothing, beside those whose schema says that they are views.
FREE = "empty", "new_empty", "detach", "_unsafe_view"

# What counts the loads and stores of a backend's kernels on CPU tensors.
COUNTING = {"triton": triton_interpreter.counting, "cuda": cuda_emulator.counting}


@dataclass(frozen=True)
class TrafficCount:
    """One direction of one operator on one backend; passes over a (B, T, D) activation."""

    op: str
    title: str
    direction: str  # fwd, bwd
    backend: str
    must_move: float
    read: float
    written: float
    launches: int
    calls: int  # in an optimizer step of 400 blocks; 0: not in the total
    tensors: float | None = None  # each launch's, once; older records do not tell

    @property
    def passes(self):
        return self.read + self.written

    @property
    def memory(self):
        """Passes that memory must serve when a cache serves what a launch loads again."""
        return self.passes if self.tensors is None else min(self.passes, self.tensors)


@dataclass(frozen=True)
class TrafficRecord:
    """A run: of what, its rows, and {backend: why nothing of it was counted}."""

    run: dict
    rows: list[TrafficCount]
    missing: dict[str, str]

    def to_json(self):
        return {"kind": "traffic", **asdict(self)}

    @classmethod
    def from_json(cls, record):
        return cls(
            record["run"], [TrafficCount(**row) for row in record["rows"]], record["missing"]
        )


def measure(shape, progress=lambda what, of: None, cases=CASES, published=None):
    """Count every operator on every backend that runs on CPU tensors.

    published  the folder of a checkout of erwold/mv-split, whose operators get rows as well;
               RuntimeError: it is none
    """
    triton_interpreter.use()
    run = describe_run(shape)
    with cuda_emulator.counting(Traffic()):
        missing = {b: _backends.missing(b, _backends.OPS[0], "cpu") for b in _backends.BACKENDS}
    backends = [b for b, why in missing.items() if why is None]
    columns = {case: _columns(case, backends, shape, published) for case in cases}
    steps = sum(map(len, columns.values()))
    rows = []
    for case in cases:
        in_total = case.profiled and case.part_of is None
        calls = calls_per_step(case, 400) if in_total else (0, 0)
        inputs = case.example(shape)
        counts = {}
        for backend in columns[case]:
            progress(f"{case.title}, {backend}", steps)
            counts[backend] = count(case, backend, inputs, published)
        for i, direction in enumerate(("fwd", "bwd")):
            must_move = getattr(case, direction)(shape)
            for backend in columns[case]:
                traffic = counts[backend][direction]
                read, written, tensors = (
                    n / shape.pass_bytes for n in (traffic.read, traffic.written, traffic.tensors)
                )
                moved = must_move, read, written, traffic.launches, calls[i], tensors
                rows.append(TrafficCount(case.op, case.title, direction, backend, *moved))
    return TrafficRecord(run, rows, {b: why for b, why in missing.items() if why})


def _columns(case, backends, shape, published):
    """What an operator is counted on: the published kernels too, where they have it."""
    if published is None or implementations.lacks("published", case, shape.segments):
        return backends
    one_token_each = replace(shape, B=1, segments=(1,) * len(shape.segments))
    inputs = case.example(one_token_each)
    implementations.function("published", case, "cpu", published)(
        *inputs
    )  # makes what it keeps, uncounted
    return [*backends, "published"]


def count(case, backend, inputs, published=None):
    """{"fwd": Traffic, "bwd": Traffic} of one call of an operator and of its backward."""
    if backend == "reference":
        return _count_calls(case.reference, inputs)
    if backend == "published":
        function = implementations.function(backend, case, "cpu", published)
        return _count_calls(function, inputs, triton_interpreter.counting)
    with Recorder() as recorder:  # the kernels' arguments are the same on every backend
        results_and_gradients(case.fused("cpu"), *inputs)
    traffic = {"fwd": Traffic(), "bwd": Traffic()}
    for kernel_op, args, results in recorder.calls:
        op, direction = op_and_direction(kernel_op)
        if backend in COUNTING:
            counter = COUNTING[backend](traffic[direction])
            with counter, EagerCounter(traffic[direction]):
                _backends.kernel(backend, op, f"_{direction}", "cpu")(*args[:-1])
        else:
            _add_tensors(traffic[direction], args, results)
    return traffic


class Recorder(TorchDispatchMode):
    """Keeps (op, arguments, results) of every mvsplit kernel op that runs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "mvsplit":
            self.calls.append((func, args, results))
        return results


def op_and_direction(kernel_op):
    """("swiglu", "fwd") of torch.ops.mvsplit.swiglu_fwd.default."""
    return kernel_op.__name__.split(".")[0].rsplit("_", 1)


class EagerCounter(TorchDispatchMode):
    """Adds the tensors of every PyTorch operation to a Traffic; views and allocations are free."""

    def __init__(self, traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if not func.is_view and not func.__name__.startswith(FREE):
            _add_tensors(self.traffic, (args, kwargs), results)
        return results


def _count_calls(function, inputs, counting=contextlib.nullcontext):
    """What autograd runs: PyTorch operations, and kernels that `counting` counts."""
    activations, constants, kwargs = inputs
    leaves = [t.detach().requires_grad_() for t in activations]
    traffic = {"fwd": Traffic(), "bwd": Traffic()}
    with counting(traffic["fwd"]), EagerCounter(traffic["fwd"]):
        outputs = [t for t in function(leaves, constants, kwargs) if t.requires_grad]
    gradients = [torch.ones_like(t) for t in outputs]  # strided as the results are
    with counting(traffic["bwd"]), EagerCounter(traffic["bwd"]):
        torch.autograd.grad(outputs, leaves, gradients)
    return traffic


def _add_tensors(traffic, arguments, results):
    traffic.launched(arguments, results)
    traffic.read += sum(map(stored_bytes, tensors_in(arguments)))
    traffic.written += sum(map(stored_bytes, tensors_in(results)))


def traffic_cells(count):
    """Columns and rows: passes of every backend, and in brackets its launches; – is not counted.

    The total of a backend is of all operators of a step, or is not there.
    """
    backends = list(dict.fromkeys(row.backend for row in count.rows))
    found = {(row.op, row.direction, row.backend): row for row in count.rows}
    calls = {(row.op, row.direction): row for row in count.rows}

    def cell(row):
        return f"{row.passes:.2f} ({row.launches})" if row else text_tables.NOTHING

    rows = [
        (f"{of.title}, {of.direction}", f"{of.must_move:g}")
        + tuple(cell(found.get((*call, b))) for b in backends)
        for call, of in calls.items()
    ]

    floor = sum(calls[call].calls * calls[call].must_move for call in calls)
    passes = step_passes(count, lambda row: row.passes)
    shown = (f"{passes[b]:,.0f}" if b in passes else text_tables.NOTHING for b in backends)
    totals = ("a step of 400 blocks", f"{floor:,.0f}", *shown)
    return ("passes (launches)", "must move", *backends), rows, totals


def step_passes(count, passes):
    """{backend: passes(row) of a step}, of the backends that have every operator of it."""
    step = {(row.op, row.direction) for row in count.rows if row.calls}
    totals = {}
    for backend in dict.fromkeys(row.backend for row in count.rows):
        rows = [row for row in count.rows if row.backend == backend and row.calls]
        if {(row.op, row.direction) for row in rows} == step:
            totals[backend] = sum(row.calls * passes(row) for row in rows)
    return totals


def traffic_notes(count):
    """What a reader must know to read the table."""
    calls = {(row.op, row.direction): row.calls for row in count.rows}
    chained = "mvsplit_rmsnorm_with_mean"
    saved = sum(
        (row.passes if row.op == "mvsplit_rmsnorm" else -row.passes)
        * calls.get(("mvsplit_rmsnorm", row.direction), 0)
        for row in count.rows
        if row.backend == "triton" and row.op in ("mvsplit_rmsnorm", chained)
    )
    counted = {row.op for row in count.rows if row.backend == "triton"}
    backends = {row.backend for row in count.rows}
    both = {"mvsplit_rmsnorm", chained} <= counted
    memory = step_passes(count, lambda row: row.memory)
    once = ", ".join(f"{backend} {passes:,.0f}" for backend, passes in memory.items())
    return (
        f"{text_tables.shape_text(count.run['shape'])}. A pass reads or writes one (B, T, D) activation "
        "once; parameters, tables, means and partial sums are counted too.",
        "reference: the tensors of every eager operation; cpu: the tensors of a call, whose second "
        "reading comes from cache; triton and cuda: every load and store of their kernels."
        + (" published: the same of erwold/mv-split." if "published" in backends else ""),
        "A step has 700 forward and 400 backward calls of RoPE + QK-Norm and of SwiGLU, and twice "
        "as many of MV-Split + RMSNorm."
        + (f" Merges that carry the mean move {saved:,.0f} passes less in triton." if both else ""),
        f"Of a step's passes memory serves, if what a launch loads again is in a cache: {once}.",
    )


def traffic_table(count):
    columns, rows, total = traffic_cells(count)
    missing = (f"{backend}: {why}" for backend, why in count.missing.items())
    caption = *traffic_notes(count), *missing
    return text_tables.terminal("Bytes moved by one call", columns, rows, caption, total)


def options(p):
    opt.add_shape(p)
    opt.add_ops(p)
    implementations.add_published(p)
    opt.add_json(p)


def command(args):
    shape, published = opt.shape(args, "cpu"), implementations.published_checkout(args)
    opt.writable(args.json)
    with opt.progress("traffic") as progress:
        result = measure(shape, progress, opt.chosen(args.op), published)
    opt.console().print(traffic_table(result))
    if args.json:
        records.append(result.to_json(), args.json)
