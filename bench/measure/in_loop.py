"""The operators' share of real training steps, measured while the DiT of model/ trains.

Every call of an operator and of its backward has a range (bench.ranges). A range's time is the self
time of all that runs in it: on a GPU that of its kernels, read off PyTorch's profiler; on a CPU the
wall-clock, since the profiler's cost for each operation would count against eager code. Another
operator, and a block that is run again within a backward, have ranges of their own.
"""

import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass

import torch
from torch.autograd import DeviceType

from bench.cases import CASES, PAPER_MS
from bench.common import text_tables
from bench.common.machine import describe_machine, describe_run
from bench.common.timing import Timer, interleaved, no_collection, profiler
from bench.measure.op_ranges import FUSED_FROM, Clock, Range, labelled, nvtx, record_function, spans
from bench.measure.workload import EAGER, Workload
from model.config import preset, recomputed_blocks

TITLES = {case.op: case.title for case in CASES}
WARMUP = 2  # steps before any is measured
TAKES = 3  # steps with ranges on a CPU, whose clock is no profiler's: their median counts


@dataclass(frozen=True)
class InLoopTiming:
    """One operator in one implementation: what a step calls, and the self time of the calls."""

    op: str
    title: str
    implementation: str
    forward_calls: int  # recomputed ones included
    backward_calls: int
    forward_ms: float
    backward_ms: float

    @property
    def ms(self):
        return self.forward_ms + self.backward_ms


@dataclass(frozen=True)
class InLoop:
    """A run: where and of what, its rows, and the wall-clock of a step.

    step_ms  of an implementation, the median without ranges; ranges_ms of the step with them
    """

    run: dict
    rows: list[InLoopTiming]
    step_ms: dict[str, float]
    ranges_ms: dict[str, float]

    def total_ms(self, implementation):
        return sum(row.ms for row in self.rows if row.implementation == implementation)

    def to_json(self):
        return {"kind": "in_loop", **asdict(self)}

    @classmethod
    def from_json(cls, record):
        rows = [InLoopTiming(**row) for row in record["rows"]]
        return cls(record["run"], rows, record["step_ms"], record["ranges_ms"])

    def share(self, ms, implementation):
        """Of a step: on a GPU, whose kernels ranges do not slow, of one without them."""
        steps = self.step_ms if self.run.get("capability") else self.ranges_ms
        return ms / steps[implementation]


def measure(name, overrides, implementations, repeats, traced=None, marked=False, progress=None):
    """Train a preset in every implementation and read the operators' self time.

    traced   a file for a Chrome trace of the last implementation's step
    marked   NVTX ranges too
    """
    progress = progress or (lambda what, of: None)
    steps = 2 + len(implementations)
    progress("building", steps)
    run, config = describe_run(), preset(name, **overrides)
    workload = Workload(config)
    progress("timing whole steps", steps)
    seconds = _whole_steps(workload, implementations, repeats)
    rows, with_ranges = [], {}
    for implementation in implementations:
        progress(f"profiling, {implementation}", steps)
        last = implementation == implementations[-1]
        found, ms = _with_ranges(workload, implementation, traced if last else None, marked)
        rows += found
        with_ranges[implementation] = ms
    run |= {
        **describe_machine(workload.device, "cpu" if "cpu" in implementations else None),
        "preset": name,
        "config": asdict(config),
        "blocks": config.depth,
        "repeats": repeats,
    }
    return InLoop(run, rows, {name: 1e3 * s for name, s in seconds.items()}, with_ranges)


def _whole_steps(workload, implementations, repeats):
    def call(implementation):
        def step():
            with workload.running(implementation):
                workload.step()

        return step, lambda _: None

    calls = {name: call(name) for name in implementations}
    timed = interleaved(calls, repeats, Timer(workload.device))
    return {name: forward for name, (forward, _) in timed.items()}


def _with_ranges(workload, implementation, traced, marked):
    """The rows of a step with ranges, and the milliseconds that it took."""
    marks = [nvtx] if marked else []
    cuda = torch.device(workload.device).type == "cuda"
    if cuda or traced:
        profile = profiler(workload.device)
        profiled = _take(workload, implementation, spans(record_function, *marks), 1, profile)
        if traced:
            profile.export_chrome_trace(str(traced))
    if cuda:
        calls, (wall,) = profiled
        return _rows(implementation, calls, self_times(profile.events())), 1e3 * wall
    clock = Clock()
    calls, walls = _take(workload, implementation, spans(clock, *marks), TAKES, clock)
    return _rows(implementation, calls, clock.medians()), 1e3 * statistics.median(walls)


def _take(workload, implementation, span, takes, around):
    """Calls and seconds of whole steps, each within the context `around`."""
    walls = []
    with (
        workload.running(implementation),
        labelled(workload.model, span) as calls,
        no_collection(),
    ):
        for _ in range(WARMUP):
            workload.step()
        for _ in range(takes):
            workload.synchronize()
            calls.clear()
            with around:
                start = time.perf_counter()
                workload.step()
                workload.synchronize()
                walls.append(time.perf_counter() - start)
    return calls, walls


def self_times(events):
    """{(range's name, direction): seconds of its GPU kernels}, each range without those inside."""
    total = defaultdict(float)
    for event in events:
        of = Range.parse(event.name)
        if of is None or event.device_type != DeviceType.CPU:
            continue
        seconds = event.device_time_total / 1e6
        total[of.name, of.direction] += seconds
        around = _range_around(event)
        if around is not None:
            total[around.name, around.direction] -= seconds
    return dict(total)


def _range_around(event):
    event = event.cpu_parent
    while event is not None:
        of = Range.parse(event.name)
        if of is not None:
            return of
        event = event.cpu_parent
    return None


def _rows(implementation, calls, seconds):
    """A row an operator. Eager RoPE + QK-Norm is two operators, called as often as their sum."""
    ms = defaultdict(float, {of: 1e3 * s for of, s in seconds.items()})
    names = {op: op for op, direction in calls if direction == "fwd" and op not in FUSED_FROM}
    if "rope" in (op for op, _ in calls):
        del names["rope_qk_norm"]
        names = {**dict.fromkeys(FUSED_FROM, "rope_qk_norm"), **names}
        for direction in ("fwd", "bwd"):  # what is between the two: casts of what RoPE takes
            ms["rope", direction] += ms["rope_qk_norm", direction]
    return [
        InLoopTiming(
            op=op,
            title=TITLES[op],
            implementation=implementation,
            forward_calls=calls[counted, "fwd"],
            backward_calls=calls[counted, "bwd"],
            forward_ms=ms[op, "fwd"],
            backward_ms=ms[op, "bwd"],
        )
        for op, counted in names.items()
    ]


def table(result):
    """A row an operator and implementation, the paper's totals below."""
    columns = "operator implementation fwd/bwd-calls fwd-ms bwd-ms ms/step share vs-eager".split()
    eager = result.total_ms(EAGER) if EAGER in result.step_ms else None
    cells = []

    def add(title, name, ms, calls="", parts=("", ""), ratio=""):
        share = f"{100 * result.share(ms, name):.1f}%"
        cells.append((title, name, calls, *parts, f"{ms:.2f}", share, ratio))

    for name, step in result.step_ms.items():
        for row in (r for r in result.rows if r.implementation == name):
            parts = f"{row.forward_ms:.2f}", f"{row.backward_ms:.2f}"
            add(row.title, name, row.ms, f"{row.forward_calls} / {row.backward_calls}", parts)
        total = result.total_ms(name)
        ratio = f"{eager / total:.2f}x" if eager else ""
        add(f"sum, of a step of {step:.0f} ms", name, total, ratio=ratio)
    for name, implementation in (("eager", "eager"), ("fused", "its kernels")):
        ms = PAPER_MS[name]
        where = "the paper, 400 blocks, 8 H100, not this machine"
        ratio = f"{PAPER_MS['eager'] / ms:.2f}x"
        cells.append((where, implementation, "", "", "", f"{ms}", "", ratio))
    titles = [c.replace("-", " ") for c in columns]
    return text_tables.terminal(
        "Operators within whole training steps", titles, cells, notes(result)
    )


def notes(result):
    run, c = result.run, result.run["config"]
    again = sum(recomputed_blocks(c["checkpointing"], c["depth"]))
    times = "kernels on the GPU" if run.get("capability") else "operations on the CPU"
    return (
        f"{run['device']}, {run['threads']} threads, torch {run['torch']}; {run['preset']}: "
        f"{c['depth']} blocks of width {c['dim']}, {again} of them recomputed, batch {c['batch']}, "
        f"{c['precision']}; {run['date']}, {run['commit']}",
        f"ms: self time of {times} in a step with ranges, per optimizer step; of a step's wall-"
        f"clock, the median is of {run['repeats']} without ranges, taken in turn.",
    )
