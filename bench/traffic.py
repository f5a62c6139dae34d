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

from bench import emulator, interpreter, peers, records
from bench import options as opt
from bench.accuracy import results_and_gradients
from bench.cases import CASES, calls_per_step
from bench.machine import describe_run
from mvsplit_ops import _backends

# PyTorch operations that move nothing, beside those whose schema says that they are views.
FREE = "empty", "new_empty", "detach", "_unsafe_view"

# What counts the loads and stores of a backend's kernels on CPU tensors.
COUNTING = {"triton": interpreter.counting, "cuda": emulator.counting}


@dataclass
class Traffic:
    """Bytes read and written, and the launches (or PyTorch operations) that did it.

    tensors  bytes of the tensors that each launch was given, once: what memory must move when a
             cache serves all that a launch reads again
    """

    read: int = 0
    written: int = 0
    launches: int = 0
    tensors: int = 0

    def launched(self, *arguments):
        """A launch with these arguments; its loads and stores are added by who counts them."""
        self.launches += 1
        apart = {(t.data_ptr(), t.shape): t for t in _tensors(arguments)}
        self.tensors += sum(map(_bytes, apart.values()))


@dataclass(frozen=True)
class Row:
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
class Count:
    """A run: of what, its rows, and {backend: why nothing of it was counted}."""

    run: dict
    rows: list[Row]
    missing: dict[str, str]

    def to_json(self):
        return {"kind": "traffic", **asdict(self)}

    @classmethod
    def from_json(cls, record):
        return cls(record["run"], [Row(**row) for row in record["rows"]], record["missing"])


def measure(shape, progress=lambda what, of: None, cases=CASES, published=None):
    """Count every operator on every backend that runs on CPU tensors.

    published  the folder of a checkout of erwold/mv-split, whose operators get rows as well;
               RuntimeError: it is none
    """
    interpreter.use()
    run = describe_run(shape)
    with emulator.counting(Traffic()):
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
                rows.append(Row(case.op, case.title, direction, backend, *moved))
    return Count(run, rows, {b: why for b, why in missing.items() if why})


def _columns(case, backends, shape, published):
    """What an operator is counted on: the published kernels too, where they have it."""
    if published is None or peers.lacks("published", case, shape.segments):
        return backends
    one_token_each = replace(shape, B=1, segments=(1,) * len(shape.segments))
    inputs = case.example(one_token_each)
    peers.function("published", case, "cpu", published)(*inputs)  # makes what it keeps, uncounted
    return [*backends, "published"]


def count(case, backend, inputs, published=None):
    """{"fwd": Traffic, "bwd": Traffic} of one call of an operator and of its backward."""
    if backend == "reference":
        return _count_calls(case.reference, inputs)
    if backend == "published":
        function = peers.function(backend, case, "cpu", published)
        return _count_calls(function, inputs, interpreter.counting)
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
    traffic.read += sum(map(_bytes, _tensors(arguments)))
    traffic.written += sum(map(_bytes, _tensors(results)))


def _tensors(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _bytes(t):
    """Of the elements that lie in memory: a dimension that is expanded counts once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= min(size, 1) if stride == 0 else size
    return elements * t.element_size()


def options(p):
    opt.add_shape(p)
    opt.add_ops(p)
    opt.add_published(p)
    opt.add_json(p)


def command(args):
    from bench import report

    shape, published = opt.shape(args, "cpu"), opt.published(args)
    opt.writable(args.json)
    with opt.progress("traffic") as progress:
        result = measure(shape, progress, opt.chosen(args.op), published)
    opt.console().print(report.traffic_table(result))
    if args.json:
        records.append(result.to_json(), args.json)
