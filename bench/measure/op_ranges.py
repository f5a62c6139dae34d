"""Which operator of which block is running: ranges around every forward and every backward call.

Within `labelled(model, span)`, each call of an operator runs inside span(Range(op, direction,
block)), and so does its backward. The backward's extent is found in autograd's graph: every node
between a call's results and its inputs has a range of its own, so what else backward does, such as
running a checkpointed block again, is seen apart.
"""

import contextlib
import functools
import importlib.util
import statistics
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.autograd.graph import get_gradient_edge

from bench.common import options as opt
from mvsplit_ops import reference
from mvsplit_ops._register import Op

OPERATOR, BLOCK, WATCHING = "mvsplit", "block", "watching"
FUSED_FROM = ("rope", "qk_norm")  # what reference.rope_qk_norm calls
_WATCHED = "mvsplit"  # in the metadata of a node of autograd's graph


@dataclass(frozen=True)
class Range:
    """A stretch of a step. name: an operator's, "block" for a block's forward, or "watching"."""

    name: str
    direction: str  # fwd, bwd
    block: int | None

    def __str__(self):
        where = "" if self.block is None else f" of block {self.block}"
        return f"{OPERATOR}: {self.name} {self.direction}{where}"

    @classmethod
    def parse(cls, text):
        """The Range that a string tells of, or None."""
        prefix, _, rest = text.partition(": ")
        if prefix != OPERATOR:
            return None
        call, _, block = rest.partition(" of block ")
        name, direction = call.split()
        return cls(name, direction, int(block) if block else None)


def record_function(of):
    """A span that the profiler of PyTorch sees."""
    return torch.profiler.record_function(str(of))


class Clock:
    """A span that adds up seconds by (name, direction), each range without those inside it.

    Wall-clock of the CPU: what PyTorch's profiler tells of it, without its cost for each operation.
    Each time it is entered, `with clock:`, it begins to add up anew.
    """

    def __init__(self):
        self._takes = []
        self.__enter__()

    def __enter__(self):
        self._seconds = defaultdict(float)
        self._inside = [0.0]  # seconds of the ranges within each that is open, the outermost first

    def __exit__(self, *unused):
        self._takes.append(self._seconds)

    def medians(self):
        """{(name, direction): seconds}, the medians of the times that it was entered."""
        return {
            of: statistics.median(seconds[of] for seconds in self._takes) for of in self._takes[0]
        }

    @contextlib.contextmanager
    def __call__(self, of):
        self._inside.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._seconds[of.name, of.direction] += elapsed - self._inside.pop()
            self._inside[-1] += elapsed


def nvtx(of):
    """A span that Nsight Systems and Nsight Compute see (the nvtx package; no GPU is needed)."""
    import nvtx

    message = str(of).removeprefix(f"{OPERATOR}: ")
    return nvtx.annotate(message, domain=OPERATOR, category=of.name)


def spans(*of):
    """All of them at once."""

    @contextlib.contextmanager
    def both(label):
        with contextlib.ExitStack() as stack:
            for span in of:
                stack.enter_context(span(label))
            yield

    return both


def add_options(p):
    """The options of what else is made of a step with ranges."""
    p.add_argument("--nvtx", action="store_true", help="NVTX ranges by operator and block")
    p.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a Chrome trace of one step (Perfetto)"
    )


def check_options(args):
    """ValueError or RuntimeError, before anything is measured, where they cannot be met."""
    opt.writable(args.trace, "--trace")
    if args.nvtx and importlib.util.find_spec("nvtx") is None:
        raise RuntimeError("--nvtx: the nvtx package is not installed; run pip install nvtx")


@contextlib.contextmanager
def labelled(model, span):
    """Ranges around the operators and the blocks of a model.DiT; yields the Counter of calls.

    The Counter's keys are (operator, direction). The eager definition of rope_qk_norm calls RoPE,
    once for q and once for k, and QK-Norm: these have ranges and counts too.
    """
    watch = _Watch(span)
    with contextlib.ExitStack() as stack:
        for i, block in enumerate(model.blocks):
            stack.enter_context(mock.patch.object(block, "forward", watch.block(i, block.forward)))
        stack.enter_context(mock.patch.object(Op, "__call__", watch.operator(Op.__call__)))
        for name in FUSED_FROM:
            part = watch.part(name, getattr(reference, name))
            stack.enter_context(mock.patch.object(reference, name, part))
        yield watch.calls


class _Watch:
    def __init__(self, span):
        self.span, self.calls, self.inside = span, Counter(), None

    def block(self, i, forward):
        @functools.wraps(forward)
        def run(*args):
            before, self.inside = self.inside, i
            try:
                with self.span(Range(BLOCK, "fwd", i)):
                    return forward(*args)
            finally:
                self.inside = before

        return run

    def operator(self, call):
        def run(op, *inputs, **options):
            return self._watched(op.name, functools.partial(call, op), inputs, options)

        return run

    def part(self, name, function):
        @functools.wraps(function)
        def run(*inputs, **options):
            return self._watched(name, function, inputs, options)

        return run

    def _watched(self, name, function, inputs, options):
        block = self.inside
        self.calls[name, "fwd"] += 1
        with self.span(Range(name, "fwd", block)):
            outputs = function(*inputs, **options)
        with self.span(Range(WATCHING, "fwd", block)):  # no operator's time
            self._watch_backward(name, block, outputs, inputs)
        return outputs

    def _watch_backward(self, name, block, outputs, inputs):
        results = outputs if isinstance(outputs, tuple) else (outputs,)
        count = self._count_backward(name)
        for node in _between(results, inputs):
            node.register_prehook(count)
            if _WATCHED not in node.metadata:  # a part's node is the part's
                node.metadata[_WATCHED] = True
                self._watch(node, Range(name, "bwd", block))

    def _count_backward(self, name):
        """Counts the backward of one call when the first of its nodes runs."""
        seen = []

        def count(_):
            if not seen:
                seen.append(True)
                self.calls[name, "bwd"] += 1

        return count

    def _watch(self, node, of):
        running = []

        def before(_):
            running.append(self.span(of))
            running[-1].__enter__()

        def after(*_):
            running.pop().__exit__(None, None, None)

        node.register_prehook(before)
        node.register_hook(after)


def _between(results, inputs):
    """The nodes of autograd's graph that lead from results to inputs, the inputs' own left out."""
    given = (t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad)
    ends = {get_gradient_edge(t).node for t in given}
    todo = [t.grad_fn for t in results if isinstance(t, torch.Tensor) and t.grad_fn is not None]
    found = {}
    while todo:
        node = todo.pop()
        if node in ends or node in found:
            continue
        found[node] = None
        todo += [n for n, _ in node.next_functions if n is not None]
    return list(found)
