"""Bytes that an operator moves, counted instead of timed: no GPU is needed.

    reference   every tensor that an eager PyTorch operation reads or writes
    cpu         the tensors that go into the C++ kernel and come out of it; what it reads twice
                comes from cache
    triton      every byte that the kernels load and store, read off Triton's interpreter, and every
                tensor that their launchers give to PyTorch operations
    cuda        the same, read off tests/simt

A pass is one reading or writing of a (B, T, D) activation. On a GPU some of the bytes come from L2;
the count is what the kernel asks for.
"""

from dataclasses import asdict, dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import emulator, interpreter
from bench.accuracy import results_and_gradients
from bench.cases import CASES, calls_per_step
from bench.profile import describe_run
from mvsplit_ops import _backends

# What counts the loads and stores of a backend's kernels on CPU tensors.
COUNTING = {"triton": interpreter.counting, "cuda": emulator.counting}


@dataclass
class Traffic:
    """Bytes read and written, and the launches (or PyTorch operations) that did it."""

    read: int = 0
    written: int = 0
    launches: int = 0


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

    @property
    def passes(self):
        return self.read + self.written


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


def measure(shape, progress=lambda what, of: None, cases=CASES):
    """Count every operator on every backend that runs on CPU tensors."""
    interpreter.use()
    with emulator.counting(Traffic()):
        missing = {b: _backends.missing(b, _backends.OPS[0], "cpu") for b in _backends.BACKENDS}
    backends = [b for b, why in missing.items() if why is None]
    rows = []
    for case in cases:
        in_total = case.profiled and case.part_of is None
        calls = calls_per_step(case, 400) if in_total else (0, 0)
        inputs = case.inputs(shape, torch.Generator().manual_seed(0))
        counts = {}
        for backend in backends:
            progress(f"{case.title}, {backend}", len(cases) * len(backends))
            counts[backend] = count(case, backend, inputs)
        for i, direction in enumerate(("fwd", "bwd")):
            must_move = getattr(case, direction)(shape)
            for backend in backends:
                traffic = counts[backend][direction]
                read, written = (n / shape.pass_bytes for n in (traffic.read, traffic.written))
                moved = must_move, read, written, traffic.launches, calls[i]
                rows.append(Row(case.op, case.title, direction, backend, *moved))
    return Count(describe_run(shape), rows, {b: why for b, why in missing.items() if why})


def count(case, backend, inputs):
    """{"fwd": Traffic, "bwd": Traffic} of one call of an operator and of its backward."""
    if backend == "reference":
        return _count_eager(case, inputs)
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
        if not func.is_view and not func.__name__.startswith(("empty", "detach", "_unsafe_view")):
            _add_tensors(self.traffic, (args, kwargs), results)
        return results


def _count_eager(case, inputs):
    activations, constants, kwargs = inputs
    leaves = [t.detach().requires_grad_() for t in activations]
    traffic = {"fwd": Traffic(), "bwd": Traffic()}
    with EagerCounter(traffic["fwd"]):
        outputs = [t for t in case.reference(leaves, constants, kwargs) if t.requires_grad]
    gradients = [torch.ones_like(t) for t in outputs]
    with EagerCounter(traffic["bwd"]):
        torch.autograd.grad(outputs, leaves, gradients)
    return traffic


def _add_tensors(traffic, arguments, results):
    traffic.launches += 1
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
