"""Ranges around every forward and backward call of an operator in a training step.

Within `label_model(model, span)`, each call of an operator runs inside span(Range(op, direction,
block)), and so does its backward: every node of autograd's graph between the results and the inputs
of a call has a range. Whatever else backward does, such as running a checkpointed block again, is
outside that range.
"""

import argparse
import contextlib
import importlib.util
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch.autograd.graph import Node, get_gradient_edge
from torch.autograd.profiler_util import FunctionEvent

from bench.common import options as opt
from model.nn.dit import DiT
from mvsplit_ops import reference
from mvsplit_ops._register import Op

PREFIX, BLOCK, LABELLING = "mvsplit", "block", "labelling"
FUSED_FROM = ("rope", "qk_norm")  # what reference.rope_qk_norm calls
CPU_STEPS = 3  # measured steps with ranges on a CPU, which other processes disturb
_LABELLED = "mvsplit"  # in the metadata of a node of autograd's graph


@dataclass(frozen=True)
class Range:
    """Part of a step. name: an operator's, "block" for a block's forward, or "labelling"."""

    name: str
    direction: str  # fwd, bwd
    block: int | None

    def __str__(self) -> str:
        where = "" if self.block is None else f" of block {self.block}"
        return f"{PREFIX}: {self.name} {self.direction}{where}"

    @classmethod
    def parse(cls, text: str) -> "Range | None":
        """Return the Range whose string this is, or None."""
        prefix, _, rest = text.partition(": ")
        if prefix != PREFIX:
            return None
        call, _, block = rest.partition(" of block ")
        name, direction = call.split()
        return cls(name, direction, int(block) if block else None)


Context = AbstractContextManager[Any]
Span = Callable[[Range], Context]
AnyFunction = Callable[..., Any]
Direction = tuple[str, str]  # of an operator: (name, fwd or bwd)


def innermost_range(event: FunctionEvent | None) -> Range | None:
    """Return the Range of a profiler's event, or of the nearest event around it that has one."""
    while event is not None:
        if range_ := Range.parse(event.name):
            return range_
        event = event.cpu_parent
    return None


def record_function(range_: Range) -> Context:
    """Return a span for PyTorch's profiler."""
    return torch.profiler.record_function(str(range_))


def annotate_nvtx(range_: Range) -> Context:
    """Return a span for Nsight Systems and Nsight Compute (the nvtx package; needs no GPU)."""
    import nvtx

    message = str(range_).removeprefix(f"{PREFIX}: ")
    return nvtx.annotate(message, domain=PREFIX, category=range_.name)


class Clock:
    """A span that adds up seconds by (name, direction), each range without the ranges inside it.

    Wall-clock of the CPU, without the cost of PyTorch's profiler for each operation. Each
    `with clock:` starts a new sum.
    """

    def __init__(self) -> None:
        self._steps: list[dict[Direction, float]] = []
        self.__enter__()

    def __enter__(self) -> None:
        self._seconds: dict[Direction, float] = defaultdict(float)
        self._inside = [0.0]  # seconds of the ranges within each open range, the outermost first

    def __exit__(self, *error: object) -> None:
        self._steps.append(self._seconds)

    def medians(self) -> dict[Direction, float]:
        """Return {(name, direction): seconds}, the medians over the `with clock:` blocks."""
        return {
            key: statistics.median(seconds[key] for seconds in self._steps)
            for key in self._steps[0]
        }

    @contextlib.contextmanager
    def __call__(self, range_: Range) -> Iterator[None]:
        self._inside.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._seconds[range_.name, range_.direction] += elapsed - self._inside.pop()
            self._inside[-1] += elapsed


@dataclass(frozen=True)
class Tracing:
    """The options --trace, a file for a Chrome trace of one step, and --nvtx, NVTX ranges."""

    file: Path | None = None
    nvtx: bool = False

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Tracing":
        """Check the options: ValueError or RuntimeError before anything is measured."""
        opt.check_writable(args.trace, "--trace")
        if args.nvtx and importlib.util.find_spec("nvtx") is None:
            raise RuntimeError("--nvtx: the nvtx package is not installed; run pip install nvtx")
        return cls(args.trace, args.nvtx)

    def with_nvtx(self, span: Span) -> Span:
        """Return a span that enters the given one and, for --nvtx, an NVTX range in it."""

        @contextlib.contextmanager
        def annotated(range_: Range) -> Iterator[None]:
            with span(range_), annotate_nvtx(range_):
                yield

        return annotated if self.nvtx else span

    def only_nvtx(self) -> "Tracing":
        return replace(self, file=None)

    def export(self, profile: torch.profiler.profile) -> None:
        if self.file:
            profile.export_chrome_trace(str(self.file))


NO_TRACING = Tracing()


def add_tracing(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--nvtx", action="store_true", help="add NVTX ranges by operator and block")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a Chrome trace of one step (Perfetto)"
    )


@contextlib.contextmanager
def label_model(model: DiT, span: Span) -> Iterator[Counter[Direction]]:
    """Put ranges around the operators and blocks of a model; yield the Counter of calls.

    The eager definition of rope_qk_norm calls RoPE, once for q and once for k, and QK-Norm: these
    have ranges and counts too.
    """
    labels = _Labels(span)
    with contextlib.ExitStack() as stack:
        for i, block in enumerate(model.blocks):
            labelled = labels.label_block(i, block.forward)
            stack.enter_context(mock.patch.object(block, "forward", labelled))
        stack.enter_context(mock.patch.object(Op, "__call__", labels.label_operator(Op.__call__)))
        for name in FUSED_FROM:
            part = labels.label_part(name, getattr(reference, name))
            stack.enter_context(mock.patch.object(reference, name, part))
        yield labels.calls


class _Labels:
    def __init__(self, span: Span) -> None:
        self.span, self.calls = span, Counter[Direction]()
        self.block: int | None = None  # the one that is running

    def label_block(self, i: int, forward: AnyFunction) -> AnyFunction:
        def run(*args: Any) -> Any:
            outer, self.block = self.block, i
            try:
                with self.span(Range(BLOCK, "fwd", i)):
                    return forward(*args)
            finally:
                self.block = outer

        return run

    def label_operator(self, call: AnyFunction) -> AnyFunction:
        return lambda op, *args, **kwargs: self._call(op.name, partial(call, op), args, kwargs)

    def label_part(self, name: str, function: AnyFunction) -> AnyFunction:
        return lambda *args, **kwargs: self._call(name, function, args, kwargs)

    def _call(self, name: str, function: AnyFunction, inputs: Sequence, options: dict) -> Any:
        block = self.block
        self.calls[name, "fwd"] += 1
        with self.span(Range(name, "fwd", block)):
            outputs = function(*inputs, **options)
        with self.span(Range(LABELLING, "fwd", block)):  # does not count for the operator
            self._label_backward(Range(name, "bwd", block), outputs, inputs)
        return outputs

    def _label_backward(self, range_: Range, outputs: Any, inputs: Iterable[Any]) -> None:
        results = outputs if isinstance(outputs, tuple) else (outputs,)
        uncounted = [range_.name]

        def count(_: Any) -> None:  # when the first node of this call's backward runs
            if uncounted:
                self.calls[uncounted.pop(), "bwd"] += 1

        for node in _nodes_between(results, inputs):
            node.register_prehook(count)
            metadata = cast("dict[str, Any]", node.metadata)
            if _LABELLED not in metadata:  # else it belongs to a part of this operator
                metadata[_LABELLED] = True
                self._label_node(node, range_)

    def _label_node(self, node: Node, range_: Range) -> None:
        running: list[Context] = []

        def before(_: Any) -> None:
            running.append(self.span(range_))
            running[-1].__enter__()

        def after(*_: Any) -> None:
            running.pop().__exit__(None, None, None)

        node.register_prehook(before)
        node.register_hook(after)


def _nodes_between(results: Iterable[Any], inputs: Iterable[Any]) -> list[Node]:
    """Return the nodes of autograd's graph from results to inputs, without those of the inputs."""
    leaves = (t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad)
    ends = {get_gradient_edge(t).node for t in leaves}
    todo = [t.grad_fn for t in results if isinstance(t, torch.Tensor) and t.grad_fn is not None]
    nodes: dict[Node, None] = {}
    while todo:
        node = todo.pop()
        if node not in ends and node not in nodes:
            nodes[node] = None
            todo += [n for n, _ in node.next_functions if n is not None]
    return list(nodes)
