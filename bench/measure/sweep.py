"""Every operator over a sweep of shapes, in every implementation that runs here, peers included.

Per call: microseconds forward, backward and both; GB/s on the bytes that the mathematics must move,
and their share of the copy bandwidth measured in the same run; the host's microseconds; launches.
On a GPU calls are replayed from CUDA graphs on rotating inputs that together exceed its L2.
A result is checked before it is timed: what is wrong is shown as failing.
"""

import argparse
import itertools
import statistics
import time
from dataclasses import asdict, dataclass, replace

import torch
from torch.autograd import DeviceType

from bench.cases import Shape
from bench.common import options as opt
from bench.common import records, text_tables
from bench.common.accuracy import Inaccurate, Judge, cotangents_of, forward_backward
from bench.common.machine import copy_bandwidth, describe_machine, describe_run
from bench.common.timing import Replay, Timer, input_sets, profiler, samples
from bench.measure import implementations
from model.train.heap import keep_freed_memory
from mvsplit_ops import _backends
from mvsplit_ops._check import DTYPES

OURS = ("eager", *_backends.BACKENDS)  # when one of these is wrong, the command fails
HEAD = 128  # Dh of every width, and F is 3 D: the paper's
BATCHES = {"cpu": (1, 4), "cuda": (8, 26, 64, 128)}
HOST_CALLS = 50


@dataclass(frozen=True)
class Column:
    """One implementation of one operator at one shape; seconds of a call, medians.

    seconds       forward, backward, both
    host_seconds  of the host in a forward call on one token, with autograd
    launches      of the GPU, forward and backward; None on a CPU
    method        graph replay; events, where it cannot be captured; wall clock, on a CPU
    """

    seconds: tuple[float, float, float]
    host_seconds: float
    launches: tuple[int, int] | None
    method: str


@dataclass(frozen=True)
class Point:
    """One operator at one shape: {implementation: Column or why it is wrong or does not run}."""

    run: dict
    op: str
    title: str
    must_move: tuple[float, float]  # bytes, forward and backward
    copy_bytes_per_second: float
    columns: dict[str, Column]
    failed: dict[str, str]
    missing: dict[str, str]

    def to_json(self):
        return {"kind": "ops", **asdict(self)}

    @classmethod
    def from_json(cls, record):
        columns = {
            name: Column(
                tuple(c["seconds"]),
                c["host_seconds"],
                c["launches"] and tuple(c["launches"]),
                c["method"],
            )
            for name, c in record["columns"].items()
        }
        fields = {k: v for k, v in record.items() if k != "kind"}
        return cls(**{**fields, "columns": columns, "must_move": tuple(record["must_move"])})

    def bytes_per_second(self, name):
        """Of forward and backward."""
        return sum(self.must_move) / self.columns[name].seconds[2]


def measure(cases, shapes, names, repeats, published=None, progress=lambda what, of: None):
    """Measure every case at every shape in the named implementations; yields a Point each."""
    keep_freed_memory()
    steps = len(cases) * len(shapes) + 1
    progress("copy bandwidth", steps)
    copy = copy_bandwidth(shapes[0].device)
    for shape, case in itertools.product(shapes, cases):
        progress(f"{case.title}, B {shape.B}, D {shape.D}", steps)
        yield _point(case, shape, names, repeats, published, copy)


def _point(case, shape, names, repeats, published, copy):
    torch.compiler.reset()
    run, failed, functions = describe_run(shape), {}, {}
    found = {
        name: implementations.missing(name, case, shape.device, published, shape.segments)
        for name in names
    }
    inputs = case.example(shape)
    judge = Judge(case, inputs)
    for name in (name for name, why in found.items() if why is None):
        function = implementations.function(name, case, shape.device, published)
        why = _wrong(judge, name, function)
        if why is None:
            functions[name] = function
        else:
            failed[name] = why
    del judge  # its results in float64 are memory
    columns = _timed(case, shape, functions, inputs, repeats)
    described = describe_machine(shape.device, "cpu" if "cpu" in columns else None)
    return Point(
        run={**run, **described, "repeats": repeats},
        op=case.op,
        title=case.title,
        must_move=(case.fwd(shape) * shape.pass_bytes, case.bwd(shape) * shape.pass_bytes),
        copy_bytes_per_second=copy,
        columns=columns,
        failed=failed,
        missing={name: why for name, why in found.items() if why is not None},
    )


def _wrong(judge, name, function):
    """Why an implementation is not timed: its results are wrong, or it breaks off; else None."""
    try:
        judge.require(name, function)
    except Inaccurate as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  other people's code may raise anything: it is told
        return f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    return None


def _timed(case, shape, functions, inputs, repeats):
    """{name: Column}, the implementations in turn."""
    if torch.device(shape.device).type == "cuda":
        return _timed_on_gpu(case, shape, functions, repeats)
    calls = {name: forward_backward(f, *inputs) for name, f in functions.items()}
    taken = samples(calls, repeats, Timer(shape.device))
    host = {name: _host_seconds(case, shape, f) for name, f in functions.items()}
    return {
        name: Column(_medians(pairs), host[name], None, "wall clock")
        for name, pairs in taken.items()
    }


def _medians(pairs):
    forward, backward = zip(*pairs, strict=True)
    return tuple(map(statistics.median, (forward, backward, map(sum, pairs))))


def _timed_on_gpu(case, shape, functions, repeats):
    sets = input_sets(case, shape)
    columns = {}
    for name, function in functions.items():
        call = forward_backward(function, *sets[0])
        host, launches = _host_seconds(case, shape, function), _launches(*call)
        timer = Timer(shape.device)
        try:
            seconds, method = _replayed(function, sets, repeats, timer), "graph replay"
        except RuntimeError as error:
            torch.cuda.synchronize()
            reason = str(error).strip().splitlines()[0]
            seconds = _medians(samples({name: call}, repeats, timer)[name])
            method = f"events; not captured: {reason}"
        columns[name] = Column(seconds, host, launches, method)
    return columns


def _replayed(function, sets, repeats, timer):
    first = cotangents_of(function, *sets[0])
    replay = Replay(function, sets, [[t.clone() for t in first] for _ in sets])
    kinds = (replay.forward, replay.backward, replay.both)
    for kind in kinds:
        kind()
    return tuple(
        statistics.median(timer(kind)[0] for _ in range(repeats)) / replay.count for kind in kinds
    )


def _host_seconds(case, shape, function):
    """Of the host, in a forward call that is recorded for backward, on a token a segment."""
    least = replace(shape, B=1, segments=(1,) * len(shape.segments))
    inputs = case.example(least)
    forward, _ = forward_backward(function, *inputs)
    for _ in range(3):
        forward()
    taken = []
    for _ in range(HOST_CALLS):
        start = time.perf_counter()
        forward()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _launches(forward, backward):
    """Kernels, copies and fills that a call gives the GPU, forward and backward."""

    def count(call, *args):
        torch.cuda.synchronize()
        with profiler("cuda") as profile:
            result = call(*args)
            torch.cuda.synchronize()
        return sum(e.device_type == DeviceType.CUDA for e in profile.events()), result

    launches, outputs = count(forward)
    return launches, count(backward, outputs)[0]


def table(points):
    """A row an operator, shape and implementation."""
    columns = (
        *("operator", "B x T, D, dtype", "implementation", "fwd us", "bwd us", "both us", "GB/s"),
        *("% of copy", "vs eager", "host us", "launches"),
    )
    cells = []
    for point in points:
        s = point.run["shape"]
        where = f"{s['B']} x {'+'.join(map(str, s['segments']))}, {s['D']}, {s['dtype']}"
        eager = point.columns.get("eager")
        for name, c in point.columns.items():
            rate = point.bytes_per_second(name)
            cells.append(
                (
                    *(point.title, where, name),
                    *(f"{1e6 * seconds:,.1f}" for seconds in c.seconds),
                    f"{rate / 1e9:,.1f}",
                    f"{100 * rate / point.copy_bytes_per_second:.0f}%",
                    f"{eager.seconds[2] / c.seconds[2]:.2f}x" if eager else "",
                    f"{1e6 * c.host_seconds:.0f}",
                    "-" if c.launches is None else " / ".join(map(str, c.launches)),
                )
            )
        cells += [(point.title, where, n, "failed", *[""] * 7) for n in point.failed]
    return text_tables.terminal("Operators", columns, cells, notes(points))


def notes(points):
    run = points[0].run
    methods = sorted({c.method for p in points for c in p.columns.values()})
    missing = {f"{name}: {why}" for p in points for name, why in p.missing.items()}
    failed = {f"{p.op}, {name} failed: {why}" for p in points for name, why in p.failed.items()}
    return (
        f"{run['device']}, {run['threads']} threads, torch {run['torch']}; copy "
        f"{points[0].copy_bytes_per_second / 1e9:,.1f} GB/s; {run['date']}, {run['commit']}",
        f"Medians of {run['repeats']}, {', '.join(methods)}. GB/s of forward and backward on the "
        "bytes that must move; on a CPU they may stay in its cache. Host: a forward call on one "
        "token a segment, autograd included.",
        *sorted(failed),
        *sorted(missing),
    )


def options(p):
    defaults = Shape()
    p.add_argument(
        "--batch",
        type=opt.positive,
        nargs="+",
        help=f"samples per call (default: {_several(BATCHES['cpu'])}; "
        f"on a GPU {_several(BATCHES['cuda'])})",
    )
    p.add_argument(
        "--tokens",
        type=opt.token_counts,
        nargs="+",
        default=[defaults.segments],
        metavar="N[,N..]",
        help="tokens of each segment of a sample: 256,64 512,0 takes both (default: 256,64)",
    )
    p.add_argument("--dim", type=_width, nargs="+", default=[defaults.D], help="widths D")
    p.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"], help="of activations")
    opt.add_device(p)
    opt.add_ops(p)
    p.add_argument(
        "--implementation",
        nargs="+",
        choices=implementations.IMPLEMENTATIONS,
        default=implementations.IMPLEMENTATIONS,
        metavar="NAME",
        help=f"these alone, of {', '.join(implementations.IMPLEMENTATIONS)}",
    )
    implementations.add_published(p)
    p.add_argument("--repeats", type=opt.positive, default=20, help="timed calls of each")
    opt.add_json(p)


def command(args):
    opt.writable(args.json)
    published, device = implementations.published_checkout(args), opt.device(args)
    batches = args.batch or BATCHES[torch.device(device).type]
    sizes = itertools.product(args.dtype, args.dim, args.tokens, batches)
    shapes = [
        Shape(B=b, segments=t, D=d, H=d // HEAD, F=3 * d, dtype=DTYPES[dtype], device=device)
        for dtype, d, t, b in sizes
    ]
    points = []
    with opt.progress("ops") as progress:
        cases = opt.chosen(args.op)
        for point in measure(cases, shapes, args.implementation, args.repeats, published, progress):
            points.append(point)
            if args.json:
                records.append(point.to_json(), args.json)
    opt.console().print(table(points))
    wrong = [
        f"{p.op}, {name}: {p.failed[name]}" for p in points for name in OURS if name in p.failed
    ]
    if wrong:
        raise Inaccurate("; ".join(wrong))


def _width(text):
    d = opt.positive(text)
    if d % HEAD:
        raise argparse.ArgumentTypeError(f"must be a multiple of {HEAD}, got {d}")
    return d


def _several(numbers):
    return " ".join(map(str, numbers))
