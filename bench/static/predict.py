"""The operator profile of one optimizer step by calculation, beside what was measured.

A call takes its counted bytes over the bandwidth, and a fixed cost for each of its launches: what
it would take if it were as fast as its bytes allow. How far a measurement is above that is the
kernel's own doing. No GPU is needed.
"""

import argparse
import math
from dataclasses import dataclass

import torch

from bench.cases import PAPER_MS, Shape
from bench.common import options as opt
from bench.common import records, text_tables
from bench.static import roofline
from bench.static.roofline import FLOOR, LAUNCH_SECONDS, OPERATORS
from model.config import FIELDS, Config

PAPER_BLOCKS = 400
TOKENS = 26 * 320  # of a micro-batch on one GPU, about the paper's
COUNTED = ("eager", "published", "triton", "cuda")
COMPARED = (
    "Predicted: the counted bytes over the record's own copy bandwidth (of a step in the loop, the "
    "newest of its machine); on a GPU, the launches too.",
    "The copy is of 256 MiB or more, while a call's tensors may stay in cache, on a CPU above all: "
    "less than 1 is possible.",
)
COUNT_PUBLISHED = "python -m bench traffic --published PATH --json bench/results/traffic.jsonl"


@dataclass(frozen=True)
class Prediction:
    """One operator in a step: milliseconds and launches of FLOOR and of what was counted."""

    op: str
    title: str
    ms: dict[str, float]
    launches: dict[str, int]
    calls: tuple[int, int]  # forward, backward


@dataclass(frozen=True)
class Comparison:
    """A measurement beside its prediction. direction: fwd, bwd; step: the calls of a whole step."""

    device: str
    op: str
    title: str
    direction: str
    implementation: str
    shape: str
    predicted_seconds: float
    measured_seconds: float
    source: str

    @property
    def ratio(self):
        """Measured over predicted."""
        return self.measured_seconds / self.predicted_seconds


def predict(count, tokens, bandwidth, launch_seconds=LAUNCH_SECONDS, blocks=PAPER_BLOCKS):
    """A Prediction for each operator of a step of `tokens` tokens on one GPU of `bandwidth` bytes/s."""
    shape, rows = roofline.at_tokens(count, tokens), []
    for case in OPERATORS:
        costs = {n: roofline.step_cost(count, n, shape, blocks, [case]) for n in _counted(count)}
        ms = {n: 1e3 * roofline.seconds(c, bandwidth, launch_seconds) for n, c in costs.items()}
        launches = {n: c[1] for n, c in costs.items()}
        rows.append(
            Prediction(case.op, case.title, ms, launches, roofline.calls_per_step(case, blocks))
        )
    return rows


def _counted(count):
    return [n for n in (FLOOR, *COUNTED) if roofline.counts_profile(count, n)]


def implied_tokens(
    count, ms, implementation, bandwidth, launch_seconds=LAUNCH_SECONDS, blocks=PAPER_BLOCKS
):
    """Tokens of a micro-batch at which a step's operators take `ms` milliseconds.

    None: its launches alone take as long, or the implementation was not counted.
    """
    step = roofline.step_cost(count, implementation, roofline.at_tokens(count, 1), blocks)
    if step is None:
        return None
    bytes_of_a_token, launches = step
    tokens = (ms / 1e3 - launches * launch_seconds) * bandwidth / bytes_of_a_token
    return round(tokens) if tokens >= 1 else None


def compare(found, count, launch_seconds=LAUNCH_SECONDS):
    """A Comparison for each call in "profile" and "ops" records, and each step of "in_loop" ones.

    A record's own copy bandwidth is taken; of a loop, the newest of the same machine. On a CPU a
    launch costs nothing. Left out: what was not counted, and other dtypes than the counted.
    """
    rows = []
    for record in found:
        if record["kind"] == "in_loop":
            rows += _compare_loop(record, found, count, launch_seconds)
        elif record["kind"] in ("profile", "ops"):
            rows += _compare_calls(record, count, launch_seconds)
    return rows


def _compare_calls(record, count, launch_seconds):
    shape = roofline.shape_of(record["run"])
    if shape.dtype != roofline.shape_of(count.run).dtype:
        return
    for op, title, implementation, pair in _measured(record):
        for direction, measured in zip(roofline.DIRECTIONS, pair, strict=True):
            moved = roofline.call_cost(count, op, direction, implementation, shape)
            if moved is None:
                continue
            launch = launch_seconds if _on_gpu(record) else 0
            predicted = roofline.seconds(moved, record["copy_bytes_per_second"], launch)
            what = op, title, direction, implementation, _shape_text(shape)
            yield Comparison(_device(record), *what, predicted, measured, _source(record))


def _measured(record):
    """(op, title, implementation, seconds of (fwd, bwd)) of a "profile" or an "ops" record."""
    if record["kind"] == "ops":
        for name, column in record["columns"].items():
            if "failed" not in column:
                yield record["op"], record["title"], name, column["seconds"][:2]
        return
    for row in record["rows"]:
        yield row["op"], row["title"], "eager", row["seconds"]["eager"]
        yield row["op"], row["title"], record["run"]["backend"], row["seconds"]["fused"]


def _compare_loop(record, found, count, launch_seconds):
    config = Config(**{k: v for k, v in record["run"]["config"].items() if k in FIELDS})
    sizes = dict(segments=config.segments, D=config.dim, H=config.heads, F=config.ffn)
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    shape = Shape(B=config.micro_batch or config.batch, dtype=dtype, **sizes)
    copies = [r for r in found if _device(r) == _device(record) and "copy_bytes_per_second" in r]
    if not copies or dtype != roofline.shape_of(count.run).dtype:
        return
    speed = copies[-1]["copy_bytes_per_second"], launch_seconds if _on_gpu(record) else 0
    for name in dict.fromkeys(row["implementation"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["implementation"] == name]
        costs = [
            (row[calls], roofline.call_cost(count, row["op"], direction, name, shape))
            for row in rows
            for direction, calls in zip(
                roofline.DIRECTIONS, ("forward_calls", "backward_calls"), strict=True
            )
        ]
        if any(moved is None for _, moved in costs):
            continue
        predicted = sum(calls * roofline.seconds(moved, *speed) for calls, moved in costs)
        measured = sum(row["forward_ms"] + row["backward_ms"] for row in rows) / 1e3
        what = "all", f"{record['run']['preset']}, in the loop", "step", name, _shape_text(shape)
        yield Comparison(_device(record), *what, predicted, measured, _source(record))


def _on_gpu(record):
    return "capability" in record["run"]


def _device(record):
    run = record["run"]
    threads = "" if _on_gpu(record) else f", {run.get('threads')} threads"
    return f"{run.get('device')}{threads}"


def _shape_text(shape):
    segments = "+".join(map(str, shape.segments))
    dtype = str(shape.dtype).removeprefix("torch.")
    return f"{shape.B} x {segments} x {shape.D}, {dtype}"


def _source(record):
    run = record["run"]
    return f"{record['kind']}, {run['date'][:19]}, {run['commit']}"


def newest(found):
    """The last record of each thing that was measured, in the order of `found`."""
    last = {}
    for record in found:
        measured = records.measurement_key(record)
        last.pop(measured, None)
        last[measured] = record
    return list(last.values())


def prediction_cells(rows):
    """Columns, a row an operator, and the step's."""
    names = [n for n in COUNTED if n in rows[0].ms]
    columns = ("operator", "calls fwd/bwd", "floor ms", *(f"{n} ms" for n in COUNTED))
    columns += ("eager / cuda", f"launches {' / '.join(names)}")
    body = [
        (row.title, "{} / {}".format(*row.calls), *_figures(row.ms, row.launches, names))
        for row in rows
    ]
    return columns, body, ("total", "", *_figures(*_totals(rows), names))


def _totals(rows):
    ms = {n: sum(row.ms[n] for row in rows) for n in rows[0].ms}
    return ms, {n: sum(row.launches[n] for row in rows) for n in rows[0].launches}


def summary_cells(count, speeds):
    """Columns, and the step's total on each GPU: speeds is {GPU: Bandwidth}."""
    rows = {}
    for gpu, speed in speeds.items():
        rows[gpu] = predict(count, TOKENS, speed.bytes_per_second)
    columns = ("a step by calculation", *(c for c in prediction_cells(rows[gpu])[0][2:]))
    return columns, [(gpu.upper(), *prediction_cells(r)[2][2:]) for gpu, r in rows.items()]


def _figures(ms, launches, names):
    shown = (f"{ms[n]:.1f}" if n in ms else "-" for n in (FLOOR, *COUNTED))
    ratio = f"{ms['eager'] / ms['cuda']:.2f}x" if "cuda" in ms else "-"
    return *shown, ratio, " / ".join(f"{launches[n]:,}" for n in names)


def prediction_notes(count, sources, bandwidth, launch_seconds):
    """What a reader must know to read the table."""
    s = count.run["shape"]
    counted = {n: sources.get(roofline.column_of(n)) for n in COUNTED}
    files = {}
    for name in (n for n in counted if counted[n]):
        files.setdefault(roofline.origin(counted[name]), []).append(name)
    missing = [n for n in COUNTED if not counted[n]]
    return (
        f"Bandwidth {bandwidth.bytes_per_second / 1e12:.3f} TB/s: {bandwidth.source}. "
        f"A launch costs {1e6 * launch_seconds:g} us, assumed; the floor has none.",
        *(f"Bytes and launches of {', '.join(names)}: {file}." for file, names in files.items()),
        f"Counted at B {s['B']}, T {'+'.join(map(str, s['segments']))}, D {s['D']}, H {s['H']}, "
        f"F {s['F']}, {s['dtype']}; all bytes are taken to grow with the tokens, also the few of "
        "parameters, means and partial sums. What a launch loads again is taken to come from a "
        "cache, what it hands to the next launch is not.",
        *(f"{n}: {_why_missing(count, n)}" for n in missing),
    )


def _why_missing(count, name):
    if name == "published":
        return f"no committed record has counted it; {COUNT_PUBLISHED} does"
    return count.missing.get(name) or "not counted; python -m bench traffic counts it"


def paper_lines(count, bandwidth, launch_seconds):
    """What the paper's two figures imply on an H100, once by bytes alone, once with launches."""
    eager, fused = PAPER_MS["eager"], PAPER_MS["fused"]
    lines = [
        f"The paper's {eager} ms of eager operators (its kernels' own time), if they move what "
        "this project's definitions do, at an H100's "
        f"{bandwidth.bytes_per_second / 1e12:.3f} TB/s ({bandwidth.source}):"
    ]
    for launch in dict.fromkeys((0.0, launch_seconds)):
        speed = bandwidth.bytes_per_second, launch
        how = f"at {1e6 * launch:g} us a launch" if launch else "by bytes alone"
        tokens = implied_tokens(count, eager, "eager", *speed)
        if tokens is None:
            lines.append(f"{how}: at no number of tokens, for its launches alone take longer.")
            continue
        rows = predict(count, tokens, *speed)
        ms = {n: sum(row.ms[n] for row in rows) for n in rows[0].ms if n != "eager"}
        samples = tokens / roofline.shape_of(count.run).T
        lines.append(
            f"{how}: {tokens:,} tokens a GPU and micro-batch ({samples:.0f} samples); there "
            + ", ".join(f"{n} {value:.1f} ms" for n, value in ms.items())
            + f".{_published_text(count, ms, speed)}"
        )
    if not roofline.counts_profile(count, "published"):
        lines.append(
            f"The paper's {fused} ms of its kernels stand beside no prediction until these are "
            f"counted: {COUNT_PUBLISHED}"
        )
    return lines


def _published_text(count, ms, speed):
    """How far the paper's figure of its kernels is from what they move."""
    if "published" not in ms:
        return ""
    paper = PAPER_MS["fused"]
    tokens = implied_tokens(count, paper, "published", *speed)
    implied = f"would imply {tokens:,} tokens" if tokens else "are less than their launches take"
    return (
        f" The paper's {paper} ms of its kernels are {paper / ms['published']:.2f} times their "
        f"prediction, and {implied}."
    )


def comparison_cells(rows):
    """Columns, and predicted and measured of every call."""
    columns = (
        *("operator", "direction", "implementation", "predicted ms", "measured ms"),
        *("measured / predicted", "shape", "record"),
    )
    cells = [
        (
            *(row.title, row.direction, row.implementation),
            *(f"{1e3 * s:.4f}" for s in (row.predicted_seconds, row.measured_seconds)),
            *(f"{row.ratio:.2f}", row.shape, row.source),
        )
        for row in rows
    ]
    return columns, cells


def by_device(rows):
    """{device: its rows}"""
    return {
        device: [r for r in rows if r.device == device] for device in {r.device: 0 for r in rows}
    }


def microseconds(text):
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def options(p):
    p.add_argument("--gpu", choices=roofline.DATASHEET, default="h100", help="whose bandwidth")
    p.add_argument(
        "--tokens", type=opt.positive, default=TOKENS, help="of a micro-batch on one GPU"
    )
    p.add_argument("--blocks", type=opt.positive, default=PAPER_BLOCKS, help="3/4 recomputed")
    p.add_argument(
        "--launch-us", type=microseconds, default=1e6 * LAUNCH_SECONDS, help="cost of a launch"
    )
    p.add_argument("--all", action="store_true", help="every measurement, not the newest alone")


def command(args):
    found = records.read_folder(records.RESULTS)
    count, sources = roofline.newest_count(found)
    launch = args.launch_us / 1e6
    speed = roofline.bandwidth(args.gpu, found)
    rows = predict(count, args.tokens, speed.bytes_per_second, launch, args.blocks)
    title = (
        f"A step by calculation: {args.gpu.upper()}, {args.tokens:,} tokens, {args.blocks} blocks"
    )
    console = opt.console()
    columns, body, total = prediction_cells(rows)
    notes = prediction_notes(count, sources, speed, launch)
    console.print(text_tables.terminal(title, columns, body, notes, total))
    for line in paper_lines(count, roofline.bandwidth("h100", found), launch):
        console.print(line, highlight=False)
    compared = compare(found if args.all else newest(found), count, launch)
    for device, of in by_device(compared).items():
        columns, cells = comparison_cells(of)
        title = f"Measured beside predicted, {device}"
        console.print(text_tables.terminal(title, columns, cells, COMPARED))
