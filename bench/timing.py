"""Seconds of a call, on a CPU or a CUDA device."""

import statistics
import time

import torch

_L2_FLUSH_BYTES = 256 << 20  # several times the L2 of any current GPU


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
    """Median (forward, backward) seconds of each {name: call}, taken in turn, `repeats` times.

    A call is a pair: forward() gives what backward takes. Taking turns, a slow moment of the
    machine meets every implementation alike; the first fifth warms up and does not count.
    """
    seconds = {name: ([], []) for name in calls}
    warmup = max(1, repeats // 5)
    for repeat in range(warmup + repeats):
        for name, (forward, backward) in calls.items():
            forward_s, result = timer(forward)
            backward_s, _ = timer(lambda b=backward, r=result: b(r))
            if repeat >= warmup:
                seconds[name][0].append(forward_s)
                seconds[name][1].append(backward_s)
    return {name: tuple(map(statistics.median, pair)) for name, pair in seconds.items()}


def copy_bandwidth(device, megabytes=256, repeats=15):
    """Bytes per second, read and written, of a large tensor copy."""
    source = torch.ones(megabytes << 20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timer = Timer(device)
    seconds = [timer(lambda: target.copy_(source))[0] for _ in range(repeats + 3)][3:]
    return 2 * source.numel() / statistics.median(seconds)
