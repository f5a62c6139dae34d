"""Seconds of a call, on a CPU or a CUDA device."""

import contextlib
import gc
import statistics
import time

import torch

_L2_FLUSH_BYTES = 256 << 20  # several times the L2 of any current GPU
_MOST_SETS = 32  # of inputs in one captured graph


class Timer:
    """timer(f) -> (seconds, result of f)."""

    def __init__(self, device):
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            self.flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, f):
        if not self.cuda:
            start = time.perf_counter()
            result = f()
            return time.perf_counter() - start, result
        self.flush.zero_()  # cold L2
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = f()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, result


def interleaved(calls, repeats, timer):
    """Median (forward, backward) seconds of each {name: call}, taken in turn, `repeats` times."""
    taken = samples(calls, repeats, timer)
    return {
        name: tuple(statistics.median(s[i] for s in pairs) for i in (0, 1))
        for name, pairs in taken.items()
    }


def samples(calls, repeats, timer):
    """{name: (forward, backward) seconds of each turn} of {name: call}.

    A call is a pair: forward() gives what backward takes. Taking turns, a slow moment of the
    machine meets every implementation alike; the first fifth warms up and does not count.
    """
    seconds = {name: [] for name in calls}
    warmup = max(1, repeats // 5)
    for repeat in range(warmup + repeats):
        for name, (forward, backward) in calls.items():
            forward_s, result = timer(forward)
            backward_s, _ = timer(lambda b=backward, r=result: b(r))
            if repeat >= warmup:
                seconds[name].append((forward_s, backward_s))
    return seconds


def profiler(device):
    """PyTorch's profiler of the CPU and, where the device is one, of the GPU's kernels."""
    kinds = torch.profiler.ProfilerActivity
    cuda = torch.device(device).type == "cuda"
    return torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if cuda else [kinds.CPU])


@contextlib.contextmanager
def no_collection():
    """No garbage collection within the block: it would walk through what watches a step."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Replay:
    """A call captured in CUDA graphs on several sets of inputs, one after the other.

    Replaying one costs no host time between the calls, so kernels shorter than a launch can be
    timed; the sets together are several times the L2, so that each call finds its inputs cold.

    forward, backward, both    replay every set's forward, backward, or forward and backward

    call      (activations, constants, kwargs) -> tuple of results
    sets      inputs (activations, constants, kwargs); cotangents of each set's results
    RuntimeError: the call cannot be captured, because it waits for the GPU or allocates.
    """

    def __init__(self, call, sets, cotangents):
        self.count, self._keep = len(sets), []
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        leaves = [[t.detach().requires_grad_() for t in activations] for activations, *_ in sets]

        def run(i):
            _, constants, kwargs = sets[i]
            return call(leaves[i], constants, kwargs)

        def back(i, outputs):
            return torch.autograd.grad(outputs, leaves[i], cotangents[i])

        every = range(self.count)
        with torch.cuda.stream(self._stream):
            for _ in range(3):  # compile, load and choose before the capture
                for i in every:
                    back(i, run(i))
            # Backward runs on the stream of its forward: that must be the one that captures.
            outputs = [run(i) for i in every]
        self.forward = self._captured(lambda: [run(i) for i in every])
        self.backward = self._captured(lambda: [back(i, outputs[i]) for i in every])
        self.both = self._captured(lambda: [(o := run(i), back(i, o)) for i in every])

    def _captured(self, calls):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=self._stream):
            self._keep.append(calls())  # alive, so that no call writes where another has written
        return graph.replay


def input_sets(case, shape):
    """Inputs of a case on a GPU, so many that together they are several times its L2."""
    first = case.example(shape)
    size = sum(t.nbytes for t in first[0])
    count = min(_MOST_SETS, max(1, -(-_L2_FLUSH_BYTES // size)))
    return [first] + [
        ([t.clone() for t in first[0]], [t.clone() for t in first[1]], first[2])
        for _ in range(count - 1)
    ]
