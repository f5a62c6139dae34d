"""Time of a call on a CPU or a CUDA device."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.cases import Case, Function, Inputs, Results, Shape, is_cuda

_L2_FLUSH_BYTES = 256 << 20  # several times the L2 of any current GPU
_MOST_SETS = 32  # sets of inputs in one captured graph

Result = TypeVar("Result")
Name = TypeVar("Name", bound=Hashable)
Seconds = tuple[float, float, float]  # forward, backward, both
CallPair = tuple[Callable[[], Any], Callable[[Any], Any]]  # backward takes what forward returns


class Timer:
    """A callable: timer(f) returns (seconds, result of f)."""

    def __init__(self, device: str | torch.device) -> None:
        self.cuda = is_cuda(device)
        if self.cuda:
            self.flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, f: Callable[[], Result]) -> tuple[float, Result]:
        if not self.cuda:
            begin = time.perf_counter()
            result = f()
            return time.perf_counter() - begin, result
        self.flush.zero_()  # cold L2
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = f()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, result


def time_interleaved(
    calls: Mapping[Name, CallPair], repeats: int, timer: Timer
) -> dict[Name, Seconds]:
    """Return {name: median seconds of forward, backward and both} of {name: calls}.

    The implementations take turns, so that a slow moment of the machine affects all of them alike.
    The first fifth of the turns warms up and does not count.
    """
    turns: dict[Name, list[Seconds]] = {name: [] for name in calls}
    warmup = max(1, repeats // 5)
    for repeat in range(warmup + repeats):
        for name, (forward, backward) in calls.items():
            forward_s, result = timer(forward)
            backward_s, _ = timer(lambda b=backward, r=result: b(r))  # type: ignore[misc]
            if repeat >= warmup:
                turns[name].append((forward_s, backward_s, forward_s + backward_s))
    return {name: _medians(seconds) for name, seconds in turns.items()}


def _medians(seconds: Sequence[Seconds]) -> Seconds:
    forward, backward, total = map(statistics.median, zip(*seconds, strict=True))
    return forward, backward, total


def make_profiler(device: str | torch.device) -> torch.profiler.profile:
    """Return PyTorch's profiler of the CPU and, on a CUDA device, of the GPU's kernels."""
    kinds = torch.profiler.ProfilerActivity
    return torch.profiler.profile(
        activities=[kinds.CPU, kinds.CUDA] if is_cuda(device) else [kinds.CPU]
    )


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Disable garbage collection in the block: it would walk the objects that watch a step."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Replay:
    """A call captured in CUDA graphs on several sets of inputs, one after the other.

    Replaying one costs no host time between the calls, so that kernels shorter than a launch can be
    timed; the sets together are several times the L2, so that each call finds its inputs cold.

    forward, backward, both    replay every set's forward, backward, or forward and backward

    call      (activations, constants, kwargs) -> tuple of results
    sets      inputs (activations, constants, kwargs); cotangents of each set's results
    RuntimeError: the call cannot be captured, because it waits for the GPU or allocates.
    """

    def __init__(
        self, call: Function, sets: Sequence[Inputs], cotangents: Sequence[Sequence[Tensor]]
    ) -> None:
        self.count = len(sets)
        self._results: list[Any] = []
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        leaves = [[t.detach().requires_grad_() for t in activations] for activations, *_ in sets]

        def run(i: int) -> Results:
            _, constants, kwargs = sets[i]
            return call(leaves[i], constants, kwargs)

        def back(i: int, outputs: Results) -> Results:
            return torch.autograd.grad(outputs, leaves[i], cotangents[i])

        every = range(self.count)
        with torch.cuda.stream(self._stream):
            for _ in range(3):  # compile, load and choose before the capture
                for i in every:
                    back(i, run(i))
            # Backward runs on the stream of its forward: that must be the one that captures.
            outputs = [run(i) for i in every]
        self.forward = self._capture(lambda: [run(i) for i in every])
        self.backward = self._capture(lambda: [back(i, outputs[i]) for i in every])
        self.both = self._capture(lambda: [(o := run(i), back(i, o)) for i in every])

    def _capture(self, calls: Callable[[], list[Any]]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=self._stream):
            self._results.append(calls())  # alive: no call may write where another has written
        return graph.replay


def make_input_sets(case: Case, shape: Shape) -> list[Inputs]:
    """Return inputs of a case on a GPU, several times its L2 together."""
    first = case.example(shape)
    size = sum(t.nbytes for t in first[0])
    count = min(_MOST_SETS, max(1, -(-_L2_FLUSH_BYTES // size)))
    return [first] + [
        ([t.clone() for t in first[0]], [t.clone() for t in first[1]], first[2])
        for _ in range(count - 1)
    ]
