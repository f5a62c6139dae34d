"""Times of every operator on every backend, for pytest-benchmark to save and to compare.

pytest bench --benchmark-only --benchmark-autosave      save this run in .benchmarks/
pytest bench --benchmark-only --benchmark-compare       fail if a call is 15 % slower
"""

import functools
import time
from typing import Any

import pytest
import torch

from bench.cases import CASES, Case, Shape
from bench.common.accuracy import forward_backward, require_case
from bench.common.timing import CallPair
from bench.measure import implementations
from model.train.heap import keep_freed_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REGRESSION_SHAPE = Shape(B=26 if DEVICE == "cuda" else 2, device=DEVICE)
TIMED = [
    name
    for name in ("eager", "cpu", "triton", "cuda")
    if all(implementations.missing_reason(name, case, DEVICE) is None for case in CASES)
]


def read_clock() -> float:
    """Return seconds, after the GPU has finished all work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@functools.cache
def checked_calls(case: Case, implementation: str) -> CallPair:
    """Return (forward, backward) of a case after checking its results and gradients."""
    keep_freed_memory()
    inputs = case.example(REGRESSION_SHAPE)
    function = implementations.load_function(implementation, case, DEVICE)
    peer = implementations.is_peer(implementation)
    require_case(case, implementation, function, inputs, peer=peer)
    return forward_backward(function, *inputs)


@pytest.mark.benchmark(timer=read_clock, max_time=0.5, warmup=True, warmup_iterations=5)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("implementation", TIMED)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_call(benchmark: Any, case: Case, implementation: str, direction: str) -> None:
    forward, backward = checked_calls(case, implementation)
    if direction == "forward":
        assert benchmark(forward)
    else:
        rounds = {"rounds": 20, "warmup_rounds": 3}
        assert benchmark.pedantic(backward, setup=lambda: ((forward(),), {}), **rounds)
