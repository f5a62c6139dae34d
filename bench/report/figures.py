"""Figures of the report: a function for each plot, from records to title, drawing and caption."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure as Drawing

from bench.cases import CASES_BY_OP, PAPER_MS
from bench.common.records import Run
from bench.common.text_tables import shape_text, width_text
from bench.measure.in_loop import InLoop
from bench.measure.profile import Profile
from bench.measure.sweep import Point
from bench.measure.train_step import Steps
from bench.report import plots, select
from bench.report.select import SourcedRecord, list_sources, newest
from bench.report.tables import predict_gpus
from bench.static import predict
from bench.static.traffic_record import TrafficRecord

BYTES_LABEL, RATE_LABEL = "MB that a forward and a backward must move", "GB/s on those bytes"


@dataclass(frozen=True)
class Figure:
    """A plot with its title, its caption and a line for each source."""

    title: str
    drawing: Drawing
    caption: str
    sources: Sequence[str] = ()


def make_figures(records: Sequence[SourcedRecord]) -> list[Figure]:
    """Return the figures of the newest records."""

    def each(kind: str, make: Callable[[SourcedRecord[Any]], Figure | None]) -> list[Figure]:
        return [
            replace(figure, sources=list_sources([record]))
            for record in newest(records, kind)
            if (figure := make(record))
        ]

    return [
        *each("profile", lambda record: speed_up_figure(select.named_profile(record))),
        *each("profile", roofline_figure),
        *sweep_figures(records),
        *each("in_loop", in_loop_figure),
        *(paper_figure() for r in newest(records, "in_loop") if "capability" in r.run),
        *each("step", step_figure),
        *each("traffic", traffic_figure),
        *prediction_figures(records),
    ]


def speed_up_figure(profile: Profile, notes: Sequence[str] = ()) -> Figure | None:
    """Return the figure of a profile, or None if nothing is compared with eager code."""
    values = {
        row.title: {
            name: row.ms_per_step("eager") / row.ms_per_step(name)
            for name in row.seconds
            if name != "eager"
        }
        for row in profile.rows
        if "eager" in row.seconds
    }
    if not any(values.values()):
        return None
    caption = (
        "Forward and backward calls in the ratio 700 to 400, as in a step that recomputes three of "
        f"four blocks, at {shape_text(profile.run['shape'])}. Longer bars are faster."
    )
    drawing = plots.bars({"": values}, "times faster than eager PyTorch", (1.0, "eager = 1"))
    title = f"Speed-up over eager PyTorch, {profile.run['device']}"
    return Figure(title, drawing, " ".join((caption, *(f"{note}." for note in notes))))


def roofline_figure(record: SourcedRecord[Profile]) -> Figure:
    profile = select.named_profile(record)
    points = {
        row.title: {n: _rate_point(sum(row.bytes), row.call_ms(n) / 1e3) for n in row.seconds}
        for row in profile.rows
    }
    roof = _copy_line(profile.copy_bytes_per_second)
    return Figure(
        f"Operators and the copy bandwidth, {record.device}",
        plots.roofline(points, roof, BYTES_LABEL, RATE_LABEL),
        "An operator on the dashed line would move only the bytes that it must move, as fast as "
        f"memory is copied. {shape_text(record.run['shape'])}; small tensors may stay in cache.",
    )


def _rate_point(moved: float, seconds: float) -> tuple[float, float]:
    return moved / 1e6, moved / seconds / 1e9


def _copy_line(bytes_per_second: float) -> plots.Line:
    return bytes_per_second / 1e9, f"copy, {bytes_per_second / 1e9:.4g} GB/s"


def sweep_figures(records: Sequence[SourcedRecord]) -> list[Figure]:
    """Return, for each device and width, the speed-up, and rates and times over several sizes."""
    figures = []
    for sweep in select.group_sweeps(records):
        profile, largest = select.largest_profile(sweep)
        failures = select.list_failures(largest, with_missing=False)
        if speed_up := speed_up_figure(profile, failures):
            title = f"Speed-up over eager PyTorch, with peers, {sweep[0].device}"
            figures.append(replace(speed_up, title=title, sources=list_sources(largest)))
        figures += _curves_over_sizes(sweep)
    return figures


def _curves_over_sizes(sweep: Sequence[SourcedRecord[Point]]) -> list[Figure]:
    """Return rates over bytes, and times over tokens, of the operators with two or more sizes."""
    rates: plots.Curves = defaultdict(lambda: defaultdict(list))
    times: plots.Curves = defaultdict(lambda: defaultdict(list))
    for title, records in select.group_by(sweep, lambda record: record.data.title).items():
        if len({select.count_tokens(record.run) for record in records}) > 1:
            for record in records:
                tokens, moved = select.count_tokens(record.run), sum(record.data.must_move)
                for name, column in record.data.columns.items():
                    rates[title][name].append(_rate_point(moved, column.seconds[2]))
                    times[title][name].append((tokens, 1e3 * column.seconds[2]))
    if not rates:
        return []
    device, width, sources = sweep[0].device, width_text(sweep[0].run["shape"]), list_sources(sweep)
    roof = _copy_line(max(record.data.copy_bytes_per_second for record in sweep))
    return [
        Figure(
            f"Bandwidth over sizes, {device}",
            plots.curves(rates, BYTES_LABEL, RATE_LABEL, roof),
            f"Forward and backward together; {width}. The dashed line is the copy bandwidth "
            "measured in the same run.",
            sources,
        ),
        Figure(
            f"Time over tokens, {device}",
            plots.curves(times, "tokens of a call", "ms, forward and backward"),
            f"{width}; both axes are logarithmic. Lower is faster.",
            sources,
        ),
    ]


def preset_text(run: Run) -> str:
    """Return a training run's preset and the fields of its configuration that decide the time."""
    names = "depth", "dim", "heads", "ffn", "batch", "precision"
    fields = (f"{name} {run['config'][name]}" for name in names if name in run["config"])
    return ", ".join((run["preset"], *fields))


def step_figure(record: SourcedRecord[Steps]) -> Figure:
    rows = []
    for row in record.data.rows:
        parts = row.breakdown or {"not split up": row.step}
        label = f"{row.residual}, {row.implementation}, {row.checkpointing}"
        rows.append((label, {part: 1e3 * seconds for part, seconds in parts.items()}))
    return Figure(
        f"Breakdown of a step, {record.run['preset']}, {record.device}",
        plots.stacked(rows, "ms per optimizer step"),
        f"{preset_text(record.run)}. A row for each residual, implementation and checkpointing "
        "policy. The parts are from a profiled step; launch gaps: the time of a step without the "
        "profiler beyond the other parts.",
    )


def in_loop_figure(record: SourcedRecord[InLoop]) -> Figure:
    values: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in record.data.rows:  # eager RoPE and QK-Norm count as the operator that replaces them
        title = CASES_BY_OP[CASES_BY_OP[row.op].part_of or row.op].title
        values[title][row.implementation] += row.ms
    names = dict.fromkeys(row.implementation for row in record.data.rows)
    values["all operators"] = {name: record.data.total_ms(name) for name in names}
    return Figure(
        f"Operators within a training step, {record.run['preset']}, {record.device}",
        plots.bars({"": values}, "ms per optimizer step"),
        f"{preset_text(record.run)}. Self time on the device, forward and backward, while whole "
        "steps run. Shorter bars are faster.",
    )


def paper_figure() -> Figure:
    """Return the paper's figures, to compare their ratio with that of a record from a GPU."""
    paper = {"eager": PAPER_MS["eager"], "published": PAPER_MS["fused"]}
    return Figure(
        "The paper, 8 H100, its batch",
        plots.bars({"": {"all operators": paper}}, "ms per optimizer step"),
        "arXiv 2605.06169, 400 blocks: not this machine and not this batch; compare the ratios.",
    )


def traffic_figure(record: SourcedRecord[TrafficRecord]) -> Figure:
    rows: dict[str, tuple[str, float, dict[str, float]]] = {}
    for row in record.data.rows:
        label = f"{row.title}, {row.direction}"
        rows.setdefault(label, (label, row.must_move, {}))[2][row.backend] = row.passes
    missing = (f" {backend}: {reason}." for backend, reason in record.data.missing.items())
    return Figure(
        "Bytes moved by one call",
        plots.dots(list(rows.values()), "passes over a (B, T, D) activation"),
        f"{shape_text(record.run['shape'])}. Bytes read and written, counted, not timed; the "
        f"horizontal axis is logarithmic.{''.join(missing)}",
    )


def prediction_figures(records: Sequence[SourcedRecord]) -> list[Figure]:
    figures = []
    for table, operators in predict_gpus(records):
        values = {operator.title: operator.ms for operator in operators}
        values["all operators"] = predict.sum_predictions(operators).ms
        drawing = plots.bars({"": values}, "ms per optimizer step, calculated")
        caption = (
            "Not measured: counted bytes divided by a bandwidth, plus a cost for each launch. "
            f"{table.notes[0]}"
        )
        figures.append(Figure(table.title, drawing, caption, table.sources))
    return figures


def draw_profiles(profiles: Sequence[Profile]) -> Drawing:
    """Draw the README's picture: milliseconds per step of each operator, a panel per device."""
    panels = {}
    for profile in profiles:
        run, rows = profile.run, profile.total_rows
        title = f"{run['device']}, backend {run['backend']}, {run['blocks']} blocks"
        panels[title] = {row.title: {n: row.ms_per_step(n) for n in row.seconds} for row in rows}
    drawing = plots.bars(panels, "milliseconds per optimizer step (lower is better)", digits=0)
    drawing.set_figwidth(8)
    return drawing
