"""Times of every operator on every backend, for pytest-benchmark to keep and to compare.

pytest bench --benchmark-only --benchmark-autosave      keep this run in .benchmarks/
pytest bench --benchmark-only --benchmark-compare       fail where a call is 15 % slower
"""

import functools
import time

import pytest
import torch

from bench.cases import CASES, Shape
from bench.common.accuracy import forward_backward, require_case
from bench.measure import implementations
from model.train.heap import keep_freed_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = Shape(B=26 if DEVICE == "cuda" else 2, device=DEVICE)
BACKENDS = [
    name
    for name in ("eager", "cpu", "triton", "cuda")
    if all(implementations.missing(name, case, DEVICE) is None for case in CASES)
]


def clock():
    """Seconds, when the GPU has done what it was given before."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@functools.cache
def checked(case, backend):
    """(forward, backward) of a case, whose results and gradients are right."""
    keep_freed_memory()
    inputs = case.example(SHAPE)
    function = implementations.function(backend, case, DEVICE)
    require_case(case, backend, function, inputs)
    return forward_backward(function, *inputs)


@pytest.mark.benchmark(timer=clock, max_time=0.5, warmup=True, warmup_iterations=5)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_call(benchmark, case, backend, direction):
    forward, backward = checked(case, backend)
    if direction == "forward":
        assert benchmark(forward)
    else:
        prepared = {"setup": lambda: ((forward(),), {})}
        assert benchmark.pedantic(backward, **prepared, rounds=20, warmup_rounds=3)
