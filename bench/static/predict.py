"""The operator profile of an optimizer step by calculation, compared with measured times.

A call takes its counted bytes divided by the bandwidth, plus a fixed cost per launch: the time of a
call that is as fast as its bytes allow. The kernel itself causes anything above that. No GPU is
needed.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.cases import PAPER_MS, calls_per_step
from bench.common import options as opt
from bench.common import records as record_files
from bench.common import text_tables
from bench.common.records import Run
from bench.common.text_tables import Row
from bench.static import comparison, roofline
from bench.static.roofline import FLOOR, LAUNCH_SECONDS, STEP_OPERATORS, Bandwidth
from bench.static.traffic_record import PAPER_BLOCKS, TrafficRecord

PAPER_TOKENS = 26 * 320  # of a micro-batch on one GPU, about the paper's
PREDICTED = ("eager", "published", "triton", "cuda")
COUNT_PUBLISHED = "python -m bench traffic --published PATH --json bench/results/traffic.jsonl"


@dataclass(frozen=True)
class Prediction:
    """One operator in a step: milliseconds and launches of FLOOR and of each implementation."""

    op: str
    title: str
    ms: dict[str, float]
    launches: dict[str, int]
    calls: tuple[int, int]  # forward, backward


def predict_step(
    traffic: TrafficRecord,
    tokens: int,
    bytes_per_second: float,
    launch_seconds: float = LAUNCH_SECONDS,
    blocks: int = PAPER_BLOCKS,
) -> list[Prediction]:
    """Return a prediction for each operator of a step with `tokens` tokens on one GPU."""
    shape, predictions = roofline.scale_to_tokens(traffic, tokens), []
    names = [n for n in (FLOOR, *PREDICTED) if roofline.covers_step(traffic, n)]
    for case in STEP_OPERATORS:
        ms, launches = {}, {}
        for name in names:
            cost = roofline.compute_step_cost(traffic, name, shape, blocks, [case])
            assert cost is not None  # covers_step
            ms[name] = 1e3 * cost.seconds(bytes_per_second, launch_seconds)
            launches[name] = cost.launches
        calls = calls_per_step(case, blocks)
        predictions.append(Prediction(case.op, case.title, ms, launches, calls))
    return predictions


def compute_implied_tokens(
    traffic: TrafficRecord,
    ms: float,
    implementation: str,
    bytes_per_second: float,
    launch_seconds: float = LAUNCH_SECONDS,
    blocks: int = PAPER_BLOCKS,
) -> int | None:
    """Return the tokens of a micro-batch with which a step's operators take `ms` milliseconds.

    None: the launches take longer than that, or the implementation was not counted.
    """
    one_token = roofline.scale_to_tokens(traffic, 1)
    cost = roofline.compute_step_cost(traffic, implementation, one_token, blocks)
    if cost is None:
        return None
    tokens = (ms / 1e3 - cost.launches * launch_seconds) * bytes_per_second / cost.bytes
    return round(tokens) if tokens >= 1 else None


def format_cells(predictions: Sequence[Prediction]) -> tuple[Row, list[Row], Row]:
    """Return columns, a row per operator, and the total of the step."""
    names = [n for n in PREDICTED if n in predictions[0].ms]
    columns = ("operator", "calls fwd/bwd", "floor ms", *(f"{n} ms" for n in PREDICTED))
    columns += ("eager / cuda", f"launches {' / '.join(names)}")
    rows: list[Row] = [
        (p.title, "{} / {}".format(*p.calls), *_format_figures(p.ms, p.launches, names))
        for p in predictions
    ]
    launches = {n: sum(p.launches[n] for p in predictions) for n in predictions[0].launches}
    return columns, rows, ("total", "", *_format_figures(_sum_ms(predictions), launches, names))


def _sum_ms(predictions: Sequence[Prediction]) -> dict[str, float]:
    return {n: sum(p.ms[n] for p in predictions) for n in predictions[0].ms}


def _format_figures(
    ms: Mapping[str, float], launches: Mapping[str, int], names: Sequence[str]
) -> Row:
    times = (f"{ms[n]:.1f}" if n in ms else "-" for n in (FLOOR, *PREDICTED))
    ratio = f"{ms['eager'] / ms['cuda']:.2f}x" if "cuda" in ms else "-"
    return *times, ratio, " / ".join(f"{launches[n]:,}" for n in names)


def format_summary(
    traffic: TrafficRecord, bandwidths: Mapping[str, Bandwidth]
) -> tuple[Row, list[Row]]:
    """Return columns, and the total of a step on each GPU of {GPU: bandwidth}."""
    tables = {
        gpu: format_cells(predict_step(traffic, PAPER_TOKENS, bandwidth.bytes_per_second))
        for gpu, bandwidth in bandwidths.items()
    }
    columns = [columns for columns, _, _ in tables.values()][-1]
    rows: list[Row] = [(gpu.upper(), *total[2:]) for gpu, (_, _, total) in tables.items()]
    return ("a step by calculation", *columns[2:]), rows


def format_notes(
    traffic: TrafficRecord,
    sources: Mapping[str, Run],
    bandwidth: Bandwidth,
    launch_seconds: float,
) -> tuple[str, ...]:
    """Return the notes below the table: assumptions, sources, and why a column is missing."""
    names_by_origin: dict[str, list[str]] = {}
    missing = []
    for name in PREDICTED:
        run = sources.get(roofline.backend_of(name))
        if run is None:
            missing.append(f"{name}: {_missing_reason(traffic, name)}")
        else:
            names_by_origin.setdefault(roofline.describe_origin(run), []).append(name)
    return (
        f"Bandwidth {_terabytes(bandwidth)}: {bandwidth.source}. "
        f"Each launch costs {1e6 * launch_seconds:g} us, assumed; the floor has no launches.",
        *(
            f"Bytes and launches of {', '.join(names)}: {origin}."
            for origin, names in names_by_origin.items()
        ),
        f"Counted at {text_tables.shape_text(traffic.run['shape'])}. Assumed: all bytes grow with "
        "the tokens, even the few of parameters, means and partial sums; a cache serves what a "
        "launch loads again, but not what it passes to the next launch.",
        *missing,
    )


def _terabytes(bandwidth: Bandwidth) -> str:
    return f"{bandwidth.bytes_per_second / 1e12:.3f} TB/s"


def _missing_reason(traffic: TrafficRecord, name: str) -> str:
    if name == "published":
        return f"not counted in any committed record; run {COUNT_PUBLISHED}"
    return traffic.missing.get(name) or "not counted; run python -m bench traffic"


def describe_paper(
    traffic: TrafficRecord, bandwidth: Bandwidth, launch_seconds: float
) -> list[str]:
    """Return lines on the paper's two figures on an H100: tokens that they imply, and predictions.

    Once with bytes only, once with launches.
    """
    eager, fused = PAPER_MS["eager"], PAPER_MS["fused"]
    lines = [
        f"Tokens for which eager operators take the paper's {eager} ms (the time of its kernels), "
        "if they move the bytes that this project's definitions move, at an H100's "
        f"{_terabytes(bandwidth)} ({bandwidth.source}):"
    ]
    for launch in dict.fromkeys((0.0, launch_seconds)):
        speed = bandwidth.bytes_per_second, launch
        assumption = f"with {1e6 * launch:g} us per launch" if launch else "with bytes only"
        tokens = compute_implied_tokens(traffic, eager, "eager", *speed)
        if tokens is None:
            lines.append(f"{assumption}: none, the launches take longer than that.")
            continue
        ms = _sum_ms(predict_step(traffic, tokens, *speed))
        samples = tokens / roofline.read_shape(traffic.run).T
        times = ", ".join(f"{n} {value:.1f} ms" for n, value in ms.items() if n != "eager")
        lines.append(
            f"{assumption}: {tokens:,} tokens per GPU and micro-batch ({samples:.0f} samples), "
            f"with predictions {times}.{_describe_published(traffic, ms, speed)}"
        )
    if not roofline.covers_step(traffic, "published"):
        lines.append(
            f"The paper's {fused} ms of its own kernels have no prediction until these are "
            f"counted: {COUNT_PUBLISHED}"
        )
    return lines


def _describe_published(
    traffic: TrafficRecord, ms: Mapping[str, float], speed: tuple[float, float]
) -> str:
    """Return a sentence that compares the paper's time of its kernels with their prediction."""
    if "published" not in ms:
        return ""
    paper = PAPER_MS["fused"]
    tokens = compute_implied_tokens(traffic, paper, "published", *speed)
    implied = f"would imply {tokens:,} tokens" if tokens else "are less than their launches take"
    return (
        f" The paper's {paper} ms of its own kernels are {paper / ms['published']:.2f} times their "
        f"prediction, and {implied}."
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
    parser.add_argument(
        "--tokens",
        type=opt.positive,
        default=PAPER_TOKENS,
        help="tokens of a micro-batch on one GPU",
    )
    parser.add_argument(
        "--blocks",
        type=opt.positive,
        default=PAPER_BLOCKS,
        help="transformer blocks, 3/4 of them recomputed",
    )
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
    launch = args.launch_us / 1e6
    bandwidth = roofline.find_bandwidth(args.gpu, records)
    predictions = predict_step(
        traffic, args.tokens, bandwidth.bytes_per_second, launch, args.blocks
    )
    console = opt.make_console()
    title = f"Predicted step: {args.gpu.upper()}, {args.tokens:,} tokens, {args.blocks} blocks"
    columns, rows, total = format_cells(predictions)
    notes = format_notes(traffic, sources, bandwidth, launch)
    console.print(text_tables.build_table(title, columns, rows, notes, total))
    for line in describe_paper(traffic, roofline.find_bandwidth("h100", records), launch):
        console.print(line, highlight=False)
    measured = records if args.all else comparison.select_newest(records)
    comparisons = comparison.compare_records(measured, traffic, launch)
    for device, group in comparison.group_by_device(comparisons).items():
        columns, rows = comparison.format_cells(group)
        title = f"Measured and predicted, {device}"
        console.print(text_tables.build_table(title, columns, rows, comparison.COMPARISON_NOTES))
