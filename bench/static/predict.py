"""The operator profile of an optimizer step by calculation, compared with measured times.

A call takes its counted bytes divided by the bandwidth, plus a fixed cost per launch: the time of a
call that is as fast as its bytes allow. The kernel itself causes anything above that. No GPU is
needed.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bench.cases import PAPER_MS
from bench.common import options as opt
from bench.common import records as record_files
from bench.common import text_tables
from bench.common.records import Run
from bench.common.text_tables import Row, Table
from bench.static import comparison, roofline
from bench.static.roofline import FLOOR, LAUNCH_SECONDS, STEP_OPERATORS, Speed
from bench.static.traffic_record import PAPER_BLOCKS, TrafficRecord

PAPER_TOKENS = 26 * 320  # of a micro-batch on one GPU, about the paper's
PREDICTED = ("eager", "published", "triton", "cuda")
COUNT_PUBLISHED = "python -m bench traffic --published PATH --json bench/results/traffic.jsonl"


@dataclass(frozen=True)
class Prediction:
    """Milliseconds and launches of FLOOR and of each implementation: an operator's, or a step's."""

    title: str
    calls: str  # forward / backward
    ms: dict[str, float]
    launches: dict[str, int]


def predict_step(
    traffic: TrafficRecord, tokens: int, speed: Speed, blocks: int = PAPER_BLOCKS
) -> list[Prediction]:
    """Return a prediction for each operator of a step with `tokens` tokens on one GPU."""
    shape, predictions = roofline.scale_to_tokens(traffic, tokens), []
    for case in STEP_OPERATORS:
        calls = roofline.step_calls(blocks, [case])
        ms, launches = {}, {}
        for name in (FLOOR, *PREDICTED):
            cost = roofline.compute_cost(traffic, name, shape, calls)
            if cost is not None and roofline.covers_step(traffic, name):
                ms[name], launches[name] = 1e3 * speed.seconds(cost), cost.launches
        numbers = " / ".join(str(call.number) for call in calls)
        predictions.append(Prediction(case.title, numbers, ms, launches))
    return predictions


def sum_predictions(predictions: Sequence[Prediction]) -> Prediction:
    """Return the total of all operators."""
    ms = {n: sum(p.ms[n] for p in predictions) for n in predictions[0].ms}
    launches = {n: sum(p.launches[n] for p in predictions) for n in predictions[0].launches}
    return Prediction("total", "", ms, launches)


def compute_implied_tokens(
    traffic: TrafficRecord, ms: float, implementation: str, speed: Speed
) -> int | None:
    """Return the tokens of a micro-batch with which the paper's step takes `ms` milliseconds.

    None: the launches take longer than that, or the implementation was not counted.
    """
    one_token, calls = roofline.scale_to_tokens(traffic, 1), roofline.step_calls(PAPER_BLOCKS)
    cost = roofline.compute_cost(traffic, implementation, one_token, calls)
    if cost is None:
        return None
    seconds = ms / 1e3 - cost.launches * speed.launch_seconds
    tokens = seconds * speed.bytes_per_second / cost.bytes
    return round(tokens) if tokens >= 1 else None


def format_cells(predictions: Sequence[Prediction]) -> tuple[Row, list[Row], Row]:
    """Return columns, a row per operator, and the total of the step."""
    names = [n for n in PREDICTED if n in predictions[0].ms]
    columns = ("operator", "calls fwd/bwd", "floor ms", *(f"{n} ms" for n in PREDICTED))
    columns += ("eager / cuda", f"launches {' / '.join(names)}")
    rows: list[Row] = [
        (
            *(p.title, p.calls),
            *(f"{p.ms[n]:.1f}" if n in p.ms else "-" for n in (FLOOR, *PREDICTED)),
            f"{p.ms['eager'] / p.ms['cuda']:.2f}x" if "cuda" in p.ms else "-",
            " / ".join(f"{p.launches[n]:,}" for n in names),
        )
        for p in (*predictions, sum_predictions(predictions))
    ]
    return columns, rows[:-1], rows[-1]


def format_notes(
    traffic: TrafficRecord, sources: Mapping[str, Run], speed: Speed
) -> tuple[str, ...]:
    """Return the notes below the table: assumptions, sources, and why a column is missing."""
    names_by_origin: dict[str, list[str]] = {}
    missing = []
    for name in PREDICTED:
        run = sources.get(roofline.backend_of(name))
        if run is not None:
            names_by_origin.setdefault(roofline.describe_origin(run), []).append(name)
        elif name == "published":
            missing.append(f"{name}: not counted in any committed record; run {COUNT_PUBLISHED}")
        else:
            reason = traffic.missing.get(name) or "not counted; run python -m bench traffic"
            missing.append(f"{name}: {reason}")
    return (
        f"Bandwidth {_terabytes(speed)}: {speed.source}. "
        f"Each launch costs {1e6 * speed.launch_seconds:g} us, assumed; the floor has no launches.",
        *(
            f"Bytes and launches of {', '.join(names)}: {origin}."
            for origin, names in names_by_origin.items()
        ),
        f"Counted at {text_tables.shape_text(traffic.run['shape'])}. Assumed: all bytes grow with "
        "the tokens, even the few of parameters, means and partial sums; a cache serves what a "
        "launch loads again, but not what it passes to the next launch.",
        *missing,
    )


def _terabytes(speed: Speed) -> str:
    return f"{speed.bytes_per_second / 1e12:.3f} TB/s"


def describe_paper(traffic: TrafficRecord, speed: Speed) -> list[str]:
    """Return lines on the paper's two figures on an H100: tokens that they imply, and predictions.

    Once with bytes only, once with launches.
    """
    lines = [
        f"Tokens for which eager operators take the paper's {PAPER_MS['eager']} ms (the time of "
        "its kernels), if they move the bytes that this project's definitions move, at an H100's "
        f"{_terabytes(speed)} ({speed.source}):",
        f"with bytes only: {_describe_implied(traffic, replace(speed, launch_seconds=0.0))}",
    ]
    if speed.launch_seconds:
        launch = f"{1e6 * speed.launch_seconds:g} us per launch"
        lines.append(f"with {launch}: {_describe_implied(traffic, speed)}")
    if not roofline.covers_step(traffic, "published"):
        lines.append(
            f"The paper's {PAPER_MS['fused']} ms of its own kernels have no prediction until these "
            f"are counted: {COUNT_PUBLISHED}"
        )
    return lines


def _describe_implied(traffic: TrafficRecord, speed: Speed) -> str:
    tokens = compute_implied_tokens(traffic, PAPER_MS["eager"], "eager", speed)
    if tokens is None:
        return "none, the launches take longer than that."
    ms = sum_predictions(predict_step(traffic, tokens, speed)).ms
    samples = tokens / roofline.read_shape(traffic.run).T
    times = ", ".join(f"{n} {value:.1f} ms" for n, value in ms.items() if n != "eager")
    text = (
        f"{tokens:,} tokens per GPU and micro-batch ({samples:.0f} samples), with predictions "
        f"{times}."
    )
    if "published" not in ms:
        return text
    paper = PAPER_MS["fused"]
    tokens = compute_implied_tokens(traffic, paper, "published", speed)
    implied = f"would imply {tokens:,} tokens" if tokens else "are less than their launches take"
    return (
        f"{text} The paper's {paper} ms of its own kernels are {paper / ms['published']:.2f} times "
        f"their prediction, and {implied}."
    )


def microseconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", choices=roofline.DATASHEET, default="h100", help="GPU whose bandwidth is used"
    )
    opt.add_count(parser, "--tokens", "tokens of a micro-batch on one GPU", PAPER_TOKENS)
    opt.add_count(parser, "--blocks", "transformer blocks, 3/4 of them recomputed", PAPER_BLOCKS)
    parser.add_argument(
        "--launch-us",
        type=microseconds,
        default=1e6 * LAUNCH_SECONDS,
        help="cost of a launch in microseconds",
    )
    parser.add_argument(
        "--all", action="store_true", help="compare every measurement, not only the newest"
    )


def run_command(args: argparse.Namespace) -> None:
    records = record_files.read_folder(record_files.RESULTS)
    traffic, sources = roofline.merge_newest_counts(records)
    launch_seconds = args.launch_us / 1e6
    speed = roofline.find_speed(args.gpu, records, launch_seconds)
    console = opt.make_console()
    title = f"Predicted step: {args.gpu.upper()}, {args.tokens:,} tokens, {args.blocks} blocks"
    columns, rows, total = format_cells(predict_step(traffic, args.tokens, speed, args.blocks))
    notes = format_notes(traffic, sources, speed)
    console.print(Table(title, columns, rows, notes, total).to_terminal())
    for line in describe_paper(traffic, roofline.find_speed("h100", records, launch_seconds)):
        console.print(line, highlight=False)
    measured = records if args.all else comparison.select_newest(records)
    comparisons = comparison.compare_records(measured, traffic, launch_seconds)
    columns, notes = comparison.COMPARISON_COLUMNS, comparison.COMPARISON_NOTES
    for device, rows in comparison.format_cells(comparisons).items():
        title = f"Measured and predicted, {device}"
        console.print(Table(title, columns, rows, notes).to_terminal())
