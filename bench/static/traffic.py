"""Bytes that an operator moves, counted instead of timed: no GPU is needed.

    reference   every tensor that an eager PyTorch operation reads or writes, in plain arithmetic
                (see bench.cases): the backend `reference` moves more for 16-bit inputs
    cpu         the input and output tensors of the C++ kernel, once: a cache serves repeated reads
    triton      every byte that the kernels load and store in Triton's interpreter, and every
                tensor of a PyTorch operation in their launchers
    cuda        the same, counted in the emulator bench/static/cuda_emulator
    published   the same as triton, for the operators in a checkout of erwold/mv-split

A pass reads or writes one (B, T, D) activation. On a GPU the L2 cache serves some of the bytes; the
count is what the kernel requests.
"""

import argparse
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import CASES, Case, Function, Inputs, Shape, calls_per_step
from bench.common import options as opt
from bench.common import records
from bench.common.accuracy import results_and_gradients
from bench.common.machine import describe_run
from bench.measure import implementations
from bench.static import cuda_emulator, traffic_record, triton_interpreter
from bench.static.byte_counter import ByteCounter, EagerCounter
from bench.static.traffic_record import PAPER_BLOCKS, TrafficCount, TrafficRecord
from mvsplit_ops import _backends

CountKernels = Callable[[ByteCounter], contextlib.AbstractContextManager]

# Context managers that count the loads and stores of a backend's kernels on CPU tensors.
KERNEL_COUNTERS: dict[str, CountKernels] = {
    "triton": triton_interpreter.count_bytes,
    "cuda": cuda_emulator.count_bytes,
}


def measure(
    shape: Shape,
    progress: opt.ReportProgress = opt.no_progress,
    cases: Sequence[Case] = CASES,
    published: Path | None = None,
) -> TrafficRecord:
    """Count every operator on every backend that runs on CPU tensors.

    published  folder of a checkout of erwold/mv-split, whose operators are counted too;
               RuntimeError: it is not one
    """
    triton_interpreter.use()
    run = describe_run(shape)
    with cuda_emulator.using(cuda_emulator.Emulator()):
        every, op = _backends.BACKENDS, _backends.OPS[0]
        reasons = {backend: _backends.find_missing(backend, op, "cpu") for backend in every}
    available = [b for b, reason in reasons.items() if reason is None]
    selected = [(case, _select_backends(case, available, shape, published)) for case in cases]
    steps = sum(len(backends) for _, backends in selected)
    rows = []
    for case, backends in selected:
        inputs = case.example(shape)
        in_total = case.profiled and case.part_of is None
        calls = calls_per_step(case, PAPER_BLOCKS) if in_total else (0, 0)
        for backend in backends:
            progress(f"{case.title}, {backend}", steps)
            counters = count(case, backend, inputs, published)
            for (direction, counter), number in zip(counters.items(), calls, strict=True):
                rows.append(_count_passes(case, shape, backend, direction, counter, number))
    return TrafficRecord(run, rows, {b: reason for b, reason in reasons.items() if reason})


def _count_passes(
    case: Case, shape: Shape, backend: str, direction: str, counter: ByteCounter, calls: int
) -> TrafficCount:
    return TrafficCount(
        op=case.op,
        title=case.title,
        direction=direction,
        backend=backend,
        must_move=getattr(case, direction)(shape),
        read=counter.read / shape.pass_bytes,
        written=counter.written / shape.pass_bytes,
        launches=counter.launches,
        calls=calls,
        tensors=counter.tensors / shape.pass_bytes,
    )


def _select_backends(
    case: Case, available: list[str], shape: Shape, published: Path | None
) -> list[str]:
    """Return the backends to count, with "published" if the checkout has the operator."""
    if published is None or implementations.lacking_reason("published", case, shape.segments):
        return available
    one_token_each = replace(shape, B=1, segments=(1,) * len(shape.segments))
    function = implementations.load_function("published", case, "cpu", published)
    function(*case.example(one_token_each))  # fills its caches, uncounted
    return [*available, "published"]


def count(
    case: Case, backend: str, inputs: Inputs, published: Path | None = None
) -> dict[str, ByteCounter]:
    """Return counters of one call of an operator ("fwd") and of its backward ("bwd")."""
    if backend == "reference":
        return _count_autograd(case.eager, inputs)
    if backend == "published":
        function = implementations.load_function(backend, case, "cpu", published)
        return _count_autograd(function, inputs, triton_interpreter.count_bytes)
    with Recorder() as recorder:  # the kernels' arguments are the same on every backend
        results_and_gradients(case.fused("cpu"), *inputs)
    counters = {"fwd": ByteCounter(), "bwd": ByteCounter()}
    for kernel_op, args, results in recorder.calls:
        op, direction = split_kernel_op(kernel_op)
        counter = counters[direction]
        if backend in KERNEL_COUNTERS:
            with KERNEL_COUNTERS[backend](counter), EagerCounter(counter):
                _backends.load_kernel(backend, op, f"_{direction}", "cpu")(*args[:-1])
        else:
            counter.count_call(args, results)
    return counters


class Recorder(TorchDispatchMode):
    """Records (op, arguments, results) of every mvsplit kernel op that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "mvsplit":
            self.calls.append((func, args, results))
        return results


def split_kernel_op(kernel_op: Any) -> tuple[str, str]:
    """Return ("swiglu", "fwd") for torch.ops.mvsplit.swiglu_fwd.default."""
    op, direction = kernel_op.__name__.split(".")[0].rsplit("_", 1)
    return op, direction


def _count_autograd(
    function: Function, inputs: Inputs, count_kernels: CountKernels = contextlib.nullcontext
) -> dict[str, ByteCounter]:
    """Count what autograd runs: PyTorch operations, and kernels by means of `count_kernels`."""
    activations, constants, kwargs = inputs
    leaves = [t.detach().requires_grad_() for t in activations]
    counters = {"fwd": ByteCounter(), "bwd": ByteCounter()}
    with count_kernels(counters["fwd"]), EagerCounter(counters["fwd"]):
        outputs = [t for t in function(leaves, constants, kwargs) if t.requires_grad]
    gradients = [torch.ones_like(t) for t in outputs]  # the strides of the results
    with count_kernels(counters["bwd"]), EagerCounter(counters["bwd"]):
        torch.autograd.grad(outputs, leaves, gradients)
    return counters


def add_options(parser: argparse.ArgumentParser) -> None:
    opt.add_shape(parser)
    opt.add_ops(parser)
    implementations.add_published(parser)
    opt.add_json(parser)


def run_command(args: argparse.Namespace) -> None:
    shape, published = opt.chosen_shape(args, "cpu"), implementations.chosen_checkout(args)
    with opt.show_progress("traffic") as progress:
        record = measure(shape, progress, opt.chosen_cases(args.op), published)
    opt.make_console().print(traffic_record.make_table(record).to_terminal())
    records.append(record.to_json(), args.json)
