"""A sweep over operators, shapes and every implementation that runs here, peers included.

Per call: microseconds forward, backward and both; GB/s on the bytes that must move, and their share
of the copy bandwidth measured in the same run; the host's microseconds; launches. On a GPU calls
are replayed from CUDA graphs on rotating inputs that together exceed its L2. A result is checked
before it is timed: a wrong one is shown as failing.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from bench.cases import Case, Function, Inputs, Shape, is_cuda
from bench.common import options as opt
from bench.common import records
from bench.common.accuracy import Inaccurate, Judge, forward_backward, make_cotangents
from bench.common.machine import describe_machine, describe_run, measure_copy
from bench.common.text_tables import NOTHING, Row, Table, format_ratio, format_scaled
from bench.common.timing import (
    Replay,
    Seconds,
    Timer,
    make_input_sets,
    make_profiler,
    time_interleaved,
)
from bench.measure import implementations
from model.train.heap import keep_freed_memory
from mvsplit_ops import _backends
from mvsplit_ops._check import DTYPES

FAIL_IF_WRONG = ("eager", *_backends.BACKENDS)  # the command fails for them, not for peers
HEAD = 128  # Dh of every width, and F is 3 D: the paper's
BATCHES = {"cpu": (1, 4), "cuda": (8, 26, 64, 128)}
HOST_CALLS = 50


@dataclass(frozen=True)
class Column:
    """One implementation of one operator at one shape; seconds of a call, medians.

    host_seconds  of the host in a forward call on one token, with autograd
    launches      on the GPU, forward and backward; None on a CPU
    method        graph replay; events, if the call cannot be captured; wall clock, on a CPU
    """

    seconds: Seconds
    host_seconds: float
    launches: tuple[int, int] | None
    method: str


@dataclass(frozen=True)
class Point(records.Record):
    """One operator at one shape: {implementation: Column, or why it is wrong or does not run}."""

    kind = "ops"
    op: str
    title: str
    must_move: tuple[float, float]  # bytes, forward and backward
    copy_bytes_per_second: float
    columns: dict[str, Column]
    failed: dict[str, str]
    missing: dict[str, str]

    def bytes_per_second(self, name: str) -> float:
        """Return the rate of forward and backward together."""
        return sum(self.must_move) / self.columns[name].seconds[2]


def measure(
    cases: Sequence[Case],
    shapes: Sequence[Shape],
    names: Sequence[str],
    repeats: int,
    published: Path | None = None,
    progress: opt.ReportProgress = opt.no_progress,
) -> Iterator[Point]:
    """Measure every case at every shape in the named implementations; yield a Point for each."""
    keep_freed_memory()
    steps = len(cases) * len(shapes) + 1
    progress("copy bandwidth", steps)
    copy = measure_copy(shapes[0].device)
    for shape, case in itertools.product(shapes, cases):
        progress(f"{case.title}, B {shape.B}, D {shape.D}", steps)
        torch.compiler.reset()
        run, failed, missing, functions = describe_run(shape), {}, {}, {}
        inputs, device, segments = case.example(shape), shape.device, shape.segments
        judge = Judge(case, inputs)
        for name in names:
            reason = implementations.missing_reason(name, case, device, published, segments)
            if reason is not None:
                missing[name] = reason
                continue
            function = implementations.load_function(name, case, device, published)
            if (error := _find_error(judge, name, function)) is None:
                functions[name] = function
            else:
                failed[name] = error
        del judge  # its float64 results take memory
        columns = _time_functions(case, shape, functions, inputs, repeats)
        run |= describe_machine(device, "cpu" if "cpu" in columns else None)
        run["repeats"] = repeats
        moved = case.bytes_to_move(shape)
        yield Point(run, case.op, case.title, moved, copy, columns, failed, missing)


def _find_error(judge: Judge, name: str, function: Function) -> str | None:
    """Return why an implementation is not timed: wrong results or an exception; else None."""
    try:
        judge.require(name, function, implementations.is_peer(name))
    except Inaccurate as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  third-party code may raise anything; it is reported
        return f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    return None


def _time_functions(
    case: Case, shape: Shape, functions: Mapping[str, Function], inputs: Inputs, repeats: int
) -> dict[str, Column]:
    """Return {name: Column}; on a CPU the implementations take turns."""
    if is_cuda(shape.device):
        return _time_on_gpu(case, shape, functions, repeats)
    calls = {name: forward_backward(f, *inputs) for name, f in functions.items()}
    return {
        name: Column(seconds, _time_host(case, shape, functions[name]), None, "wall clock")
        for name, seconds in time_interleaved(calls, repeats, Timer(shape.device)).items()
    }


def _time_on_gpu(
    case: Case, shape: Shape, functions: Mapping[str, Function], repeats: int
) -> dict[str, Column]:
    sets = make_input_sets(case, shape)
    columns = {}
    for name, function in functions.items():
        call = forward_backward(function, *sets[0])
        host, launches = _time_host(case, shape, function), _count_launches(*call)
        timer = Timer(shape.device)
        try:
            seconds, method = _time_replay(function, sets, repeats, timer), "graph replay"
        except RuntimeError as error:
            torch.cuda.synchronize()
            reason = str(error).strip().splitlines()[0]
            seconds = time_interleaved({name: call}, repeats, timer)[name]
            method = f"events; not captured: {reason}"
        columns[name] = Column(seconds, host, launches, method)
    return columns


def _time_replay(function: Function, sets: Sequence[Inputs], repeats: int, timer: Timer) -> Seconds:
    with torch.no_grad():
        first = make_cotangents(function(*sets[0]))
    replay = Replay(function, sets, [[t.clone() for t in first] for _ in sets])
    kinds = (replay.forward, replay.backward, replay.both)
    for kind in kinds:
        kind()
    forward, backward, both = (
        statistics.median(timer(kind)[0] for _ in range(repeats)) / replay.count for kind in kinds
    )
    return forward, backward, both


def _time_host(case: Case, shape: Shape, function: Function) -> float:
    """Return the host time of a forward call with autograd, on one sample, a token per segment."""
    smallest = replace(shape, B=1, segments=(1,) * len(shape.segments))
    forward, _ = forward_backward(function, *case.example(smallest))
    timer = Timer("cpu")
    return statistics.median([timer(forward)[0] for _ in range(3 + HOST_CALLS)][3:])


def _count_launches(forward: Callable, backward: Callable) -> tuple[int, int]:
    """Return the kernels, copies and fills that a call launches, forward and backward."""

    def count(call: Callable[..., Any], *args: Any) -> tuple[int, Any]:
        torch.cuda.synchronize()
        with make_profiler("cuda") as profile:
            result = call(*args)
            torch.cuda.synchronize()
        return sum(e.device_type == DeviceType.CUDA for e in profile.events()), result

    launches, outputs = count(forward)
    return launches, count(backward, outputs)[0]


POINT_COLUMNS = (
    *("implementation", "forward us", "backward us", "both us", "host us", "launches fwd/bwd"),
    *("GB/s", "% of copy", "vs eager"),
)


def format_rows(point: Point) -> Iterator[Row]:
    """Yield the POINT_COLUMNS of each implementation at one shape, the failed ones last."""
    eager = point.columns["eager"].seconds[2] if "eager" in point.columns else None
    for name, column in point.columns.items():
        rate = point.bytes_per_second(name)
        yield (
            *(name, *(format_scaled(s, 1e-6) for s in (*column.seconds, column.host_seconds))),
            " / ".join(map(str, column.launches)) if column.launches else NOTHING,
            f"{rate / 1e9:.1f}",
            f"{100 * rate / point.copy_bytes_per_second:.0f}%",
            format_ratio(eager, column.seconds[2]),
        )
    for name in point.failed:
        yield (name, "failed", *[NOTHING] * 7)


def make_table(points: Sequence[Point]) -> Table:
    rows = []
    for point in points:
        s = point.run["shape"]
        where = f"{s['B']} x {'+'.join(map(str, s['segments']))}, {s['D']}, {s['dtype']}"
        rows += [(point.title, where, *row) for row in format_rows(point)]
    columns = "operator", "B x T, D, dtype", *POINT_COLUMNS
    return Table("Operators", columns, rows, format_notes(points))


def format_notes(points: Sequence[Point]) -> tuple[str, ...]:
    run = points[0].run
    methods = sorted({c.method for p in points for c in p.columns.values()})
    missing = {f"{name}: {reason}" for p in points for name, reason in p.missing.items()}
    failed = {f"{p.op}, {name} failed: {error}" for p in points for name, error in p.failed.items()}
    return (
        f"{run['device']}, {run['threads']} threads, torch {run['torch']}; copy "
        f"{points[0].copy_bytes_per_second / 1e9:,.1f} GB/s; {run['date']}, {run['commit']}",
        f"Medians of {run['repeats']}, {', '.join(methods)}. GB/s of forward and backward on the "
        "bytes that must move; on a CPU they may stay in its cache. Host: a forward call on one "
        "token per segment, autograd included.",
        *sorted(failed),
        *sorted(missing),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    defaults = Shape()
    cpu, gpu = (" ".join(map(str, BATCHES[kind])) for kind in ("cpu", "cuda"))
    parser.add_argument(
        "--batch",
        type=opt.positive,
        nargs="+",
        help=f"samples per call (default: {cpu}; on a GPU {gpu})",
    )
    parser.add_argument(
        "--tokens",
        type=opt.token_counts,
        nargs="+",
        default=[defaults.segments],
        metavar="N[,N..]",
        help="tokens of each segment of a sample: 256,64 512,0 measures both (default: 256,64)",
    )
    parser.add_argument("--dim", type=_width, nargs="+", default=[defaults.D], help="widths D")
    parser.add_argument(
        "--dtype", choices=DTYPES, nargs="+", default=["bf16"], help="dtypes of the activations"
    )
    opt.add_device(parser)
    opt.add_ops(parser)
    names = implementations.IMPLEMENTATIONS
    opt.add_choices(parser, "--implementation", names, "measure only these", "NAME")
    implementations.add_published(parser)
    opt.add_count(parser, "--repeats", "timed calls of each implementation", 20)
    opt.add_json(parser)


def run_command(args: argparse.Namespace) -> None:
    published, device = implementations.chosen_checkout(args), opt.select_device(args)
    batches = args.batch or BATCHES[torch.device(device).type]
    sizes = itertools.product(args.dtype, args.dim, args.tokens, batches)
    shapes = [
        Shape(B=b, segments=t, D=d, H=d // HEAD, F=3 * d, dtype=DTYPES[dtype], device=device)
        for dtype, d, t, b in sizes
    ]
    points = []
    with opt.show_progress("ops") as progress:
        cases = opt.chosen_cases(args.op)
        for point in measure(cases, shapes, args.implementation, args.repeats, published, progress):
            points.append(point)
            records.append(point.to_json(), args.json)
    opt.make_console().print(make_table(points).to_terminal())
    failed = [(p.op, name, error) for p in points for name, error in p.failed.items()]
    if wrong := [f"{op}, {name}: {e}" for op, name, e in failed if name in FAIL_IF_WRONG]:
        raise Inaccurate("; ".join(wrong))


def _width(text: str) -> int:
    d = opt.positive(text)
    if d % HEAD:
        raise argparse.ArgumentTypeError(f"must be a multiple of {HEAD}, got {d}")
    return d
