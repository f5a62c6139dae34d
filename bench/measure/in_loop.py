"""Time of the operators within real training steps of the DiT in model/.

Every call of an operator and of its backward has a range (op_ranges). A range's time is the self
time of everything that runs in it: on a GPU that of its kernels, read from PyTorch's profiler; on a
CPU the wall-clock, since the profiler's cost for each operation would count against eager code.
Another operator, and a block that is run again within a backward, have ranges of their own.
"""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from bench.cases import CASES_BY_OP, PAPER_NOTE, is_cuda
from bench.common.machine import describe_run
from bench.common.options import ReportProgress, no_progress
from bench.common.records import Record
from bench.common.text_tables import Row, Table, format_ratio
from bench.common.timing import Timer, make_profiler, no_collection, time_interleaved
from bench.measure import op_ranges
from bench.measure.op_ranges import CPU_STEPS, FUSED_FROM, Clock, Direction, Range, Span, Tracing
from bench.measure.workload import EAGER, Workload, describe_training, training_headline
from model.config import preset, recomputed_blocks

WARMUP = 2  # steps before any is measured


@dataclass(frozen=True)
class InLoopTiming:
    """One operator in one implementation: its calls in a step, and their self time."""

    op: str
    title: str
    implementation: str
    forward_calls: int  # recomputed ones included
    backward_calls: int
    forward_ms: float
    backward_ms: float

    @property
    def ms(self) -> float:
        return self.forward_ms + self.backward_ms


@dataclass(frozen=True)
class InLoop(Record):
    """A run, its rows, and the wall-clock of a step.

    step_ms  of an implementation, the median without ranges; ranges_ms of the step with them
    """

    kind = "in_loop"
    rows: list[InLoopTiming]
    step_ms: dict[str, float]
    ranges_ms: dict[str, float]

    def total_ms(self, implementation: str) -> float:
        return sum(row.ms for row in self.rows if row.implementation == implementation)

    def share(self, ms: float, implementation: str) -> float:
        """Return the share of a step: on a GPU of one without ranges, which do not slow kernels."""
        steps = self.step_ms if self.run.get("capability") else self.ranges_ms
        return ms / steps[implementation]


def measure(
    name: str,
    overrides: dict[str, Any],
    implementations: Sequence[str],
    repeats: int,
    tracing: Tracing = op_ranges.NO_TRACING,
    progress: ReportProgress = no_progress,
) -> InLoop:
    """Train a preset in every implementation and measure the operators' self time.

    tracing  its file is of the last implementation's step
    """
    steps = 2 + len(implementations)
    progress("building", steps)
    run, config = describe_run(), preset(name, **overrides)
    workload = Workload(config)
    progress("timing whole steps", steps)

    def run_step(implementation: str) -> None:
        with workload.running(implementation):
            workload.step()

    calls = {name: (partial(run_step, name), lambda _: None) for name in implementations}
    seconds = time_interleaved(calls, repeats, Timer(workload.device))
    rows: list[InLoopTiming] = []
    ranges_ms = {}
    for implementation in implementations:
        progress(f"profiling, {implementation}", steps)
        own = tracing if implementation == implementations[-1] else tracing.only_nvtx()
        timings, ranges_ms[implementation] = _measure_ranges(workload, implementation, own)
        rows += timings
    run |= describe_training(name, config, workload.device, implementations, repeats)
    run["blocks"] = config.depth
    return InLoop(run, rows, {name: 1e3 * s for name, (s, *_) in seconds.items()}, ranges_ms)


def _measure_ranges(
    workload: Workload, implementation: str, tracing: Tracing
) -> tuple[list[InLoopTiming], float]:
    """Return the rows of a step with ranges, and its milliseconds."""
    cuda, profile, clock = is_cuda(workload.device), make_profiler(workload.device), Clock()
    if cuda or tracing.file:
        span = tracing.with_nvtx(op_ranges.record_function)
        calls, walls = _run_steps(workload, implementation, span, 1, profile)
        tracing.export(profile)
    if not cuda:
        span = tracing.with_nvtx(clock)
        calls, walls = _run_steps(workload, implementation, span, CPU_STEPS, clock)
    seconds = self_times(profile.events()) if cuda else clock.medians()
    return _make_rows(implementation, calls, seconds), 1e3 * statistics.median(walls)


def _run_steps(
    workload: Workload,
    implementation: str,
    span: Span,
    steps: int,
    context: AbstractContextManager[Any],
) -> tuple[Counter[Direction], list[float]]:
    """Return calls and seconds of whole steps, each run within the context."""
    walls = []
    with (
        workload.running(implementation),
        op_ranges.label_model(workload.model, span) as calls,
        no_collection(),
    ):
        for _ in range(WARMUP):
            workload.step()
        for _ in range(steps):
            workload.synchronize()
            calls.clear()
            with context:
                start = time.perf_counter()
                workload.step()
                workload.synchronize()
                walls.append(time.perf_counter() - start)
    return calls, walls


def self_times(events: Iterable[FunctionEvent]) -> dict[Direction, float]:
    """Return {(name, direction): seconds of its GPU kernels}, ranges inside a range left out."""
    total: dict[Direction, float] = defaultdict(float)
    for event in events:
        range_ = Range.parse(event.name)
        if range_ is None or event.device_type != DeviceType.CPU:
            continue
        seconds = event.device_time_total / 1e6
        total[range_.name, range_.direction] += seconds
        if outer := op_ranges.innermost_range(event.cpu_parent):
            total[outer.name, outer.direction] -= seconds
    return dict(total)


def _make_rows(
    implementation: str, calls: Counter[Direction], seconds: dict[Direction, float]
) -> list[InLoopTiming]:
    """Return a row per operator. Eager RoPE + QK-Norm is two, called as often as the fused one."""
    ms = defaultdict(float, {key: 1e3 * s for key, s in seconds.items()})
    names = {op: op for op, direction in calls if direction == "fwd" and op not in FUSED_FROM}
    if "rope" in (op for op, _ in calls):
        del names["rope_qk_norm"]
        names = {**dict.fromkeys(FUSED_FROM, "rope_qk_norm"), **names}
        for direction in ("fwd", "bwd"):  # between the two: casts of the inputs of RoPE
            ms["rope", direction] += ms["rope_qk_norm", direction]
    rows = []
    for op, counted in names.items():
        title, times = CASES_BY_OP[op].title, (ms[op, "fwd"], ms[op, "bwd"])
        counts = calls[counted, "fwd"], calls[counted, "bwd"]
        rows.append(InLoopTiming(op, title, implementation, *counts, *times))
    return rows


IN_LOOP_COLUMNS = (
    *("operator", "implementation", "calls fwd/bwd", "forward ms/step", "backward ms/step"),
    *("both ms/step", "of a step", "vs eager"),
)


def format_rows(result: InLoop) -> list[Row]:
    """Return the IN_LOOP_COLUMNS of each operator and implementation, then of their sums."""
    rows, sums = [], []
    eager = result.total_ms(EAGER) if EAGER in result.step_ms else None
    for name in result.step_ms:
        total = result.total_ms(name)
        share, ratio = f"{100 * result.share(total, name):.1f}%", format_ratio(eager, total)
        sums.append(("all operators", name, "", "", "", f"{total:.2f}", share, ratio))
        for row in (r for r in result.rows if r.implementation == name):
            calls = f"{row.forward_calls} / {row.backward_calls}"
            parts = (f"{ms:.2f}" for ms in (row.forward_ms, row.backward_ms, row.ms))
            share = f"{100 * result.share(row.ms, name):.1f}%"
            rows.append((row.title, name, calls, *parts, share, ""))
    return [*rows, *sums]


def format_notes(result: InLoop) -> tuple[str, ...]:
    run, c = result.run, result.run["config"]
    recomputed = sum(recomputed_blocks(c["checkpointing"], c["depth"]))
    times = "kernels on the GPU" if run.get("capability") else "operations on the CPU"
    steps = ", ".join(f"{name} {ms:.1f} ms" for name, ms in result.step_ms.items())
    return (
        training_headline(run, f"{recomputed} of them recomputed", f"batch {c['batch']}"),
        f"Self time of {times} in a step with ranges. A whole step without ranges, the median of "
        f"{run['repeats']} taken in turn: {steps}.",
        PAPER_NOTE,
    )


def make_table(result: InLoop) -> Table:
    title, notes = "Operators within whole training steps", format_notes(result)
    return Table(title, IN_LOOP_COLUMNS, format_rows(result), notes)
