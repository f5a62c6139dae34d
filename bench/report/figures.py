"""Figures of the report: a function for each plot, from records to title, drawing and caption."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure as Drawing

from bench.cases import PAPER_MS
from bench.common.records import Run
from bench.common.text_tables import shape_text, width_text
from bench.measure.in_loop import InLoop
from bench.measure.profile import OperatorTiming, Profile
from bench.measure.sweep import Point
from bench.measure.train_step import Steps
from bench.report import plots
from bench.report.select import (
    CASES_BY_OP,
    SourcedRecord,
    count_tokens,
    group_sweeps,
    largest_profile,
    list_failures,
    list_sources,
    named_profile,
)
from bench.report.tables import predict_gpus
from bench.static.traffic_record import TrafficRecord

BYTES_LABEL, RATE_LABEL = "MB that a forward and a backward must move", "GB/s on those bytes"


@dataclass(frozen=True)
class Figure:
    """A plot with its title, its caption and a line for each source."""

    title: str
    drawing: Drawing
    caption: str
    sources: Sequence[str] = ()


def speed_up_figure(record: SourcedRecord[Profile]) -> Figure | None:
    title = f"Speed-up over eager PyTorch, {record.device}"
    return _speed_up(title, named_profile(record), [record])


def _speed_up(
    title: str, profile: Profile, records: Sequence[SourcedRecord], *reasons: str
) -> Figure | None:
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
    line = 1.0, "eager = 1"
    drawing = plots.bars({"": values}, "times faster than eager PyTorch", line)
    caption = " ".join((caption, *(f"{reason}." for reason in reasons)))
    return Figure(title, drawing, caption, list_sources(records))


def roofline_figure(record: SourcedRecord[Profile]) -> Figure:
    profile = named_profile(record)

    def place(row: OperatorTiming, name: str) -> tuple[float, float]:
        moved = sum(row.bytes)
        return moved / 1e6, moved / (row.call_ms(name) / 1e3) / 1e9

    points = {row.title: {name: place(row, name) for name in row.seconds} for row in profile.rows}
    roof = _copy_line(profile.copy_bytes_per_second)
    return Figure(
        f"Operators and the copy bandwidth, {record.device}",
        plots.roofline(points, roof, BYTES_LABEL, RATE_LABEL),
        "An operator on the dashed line would move only the bytes that it must move, as fast as "
        f"memory is copied. {shape_text(record.run['shape'])}; small tensors may stay in cache.",
        list_sources([record]),
    )


def _copy_line(bytes_per_second: float) -> plots.Line:
    return bytes_per_second / 1e9, f"copy, {bytes_per_second / 1e9:.4g} GB/s"


def sweep_figures(records: Sequence[SourcedRecord]) -> list[Figure]:
    """Return, for each device and width, the speed-up, and rates and times over several sizes."""
    figures = []
    for sweep in group_sweeps(records):
        title = f"Speed-up over eager PyTorch, with peers, {sweep[0].device}"
        profile, largest = largest_profile(sweep)
        failures = list_failures(largest, with_missing=False)
        figures.append(_speed_up(title, profile, largest, *failures))
        figures += [_rates_over_sizes(sweep), _times_over_tokens(sweep)]
    return [figure for figure in figures if figure]


def _panels(
    sweep: Sequence[SourcedRecord[Point]],
    place: Callable[[SourcedRecord[Point], float], tuple[float, float]],
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return {operator: {implementation: points}} of the operators that have two or more sizes.

    place(record, seconds of forward and backward) is a point.
    """
    sizes: dict[str, set[int]] = {}
    for record in sweep:
        sizes.setdefault(record.data.title, set()).add(count_tokens(record.run))
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in sweep:
        if len(sizes[record.data.title]) > 1:
            lines = panels.setdefault(record.data.title, {})
            for name, column in record.data.columns.items():
                lines.setdefault(name, []).append(place(record, column.seconds[2]))
    return {title: lines for title, lines in panels.items() if lines}


def _rates_over_sizes(sweep: Sequence[SourcedRecord[Point]]) -> Figure | None:
    def place(record: SourcedRecord[Point], seconds: float) -> tuple[float, float]:
        moved = sum(record.data.must_move)
        return moved / 1e6, moved / seconds / 1e9

    if not (panels := _panels(sweep, place)):
        return None
    roof = _copy_line(max(record.data.copy_bytes_per_second for record in sweep))
    return Figure(
        f"Bandwidth over sizes, {sweep[0].device}",
        plots.curves(panels, BYTES_LABEL, RATE_LABEL, roof),
        f"Forward and backward together; {width_text(sweep[0].run['shape'])}. The dashed line is "
        "the copy bandwidth measured in the same run.",
        list_sources(sweep),
    )


def _times_over_tokens(sweep: Sequence[SourcedRecord[Point]]) -> Figure | None:
    panels = _panels(sweep, lambda record, seconds: (count_tokens(record.run), 1e3 * seconds))
    if not panels:
        return None
    return Figure(
        f"Time over tokens, {sweep[0].device}",
        plots.curves(panels, "tokens of a call", "ms, forward and backward"),
        f"{width_text(sweep[0].run['shape'])}; both axes are logarithmic. Lower is faster.",
        list_sources(sweep),
    )


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
        list_sources([record]),
    )


def in_loop_figure(record: SourcedRecord[InLoop]) -> Figure:
    values: dict[str, dict[str, float]] = {}
    for row in record.data.rows:  # eager RoPE and QK-Norm count as the operator that replaces them
        title = CASES_BY_OP[CASES_BY_OP[row.op].part_of or row.op].title
        ms = values.setdefault(title, {})
        ms[row.implementation] = ms.get(row.implementation, 0.0) + row.ms
    names = dict.fromkeys(row.implementation for row in record.data.rows)
    values["all operators"] = {name: record.data.total_ms(name) for name in names}
    return Figure(
        f"Operators within a training step, {record.run['preset']}, {record.device}",
        plots.bars({"": values}, "ms per optimizer step"),
        f"{preset_text(record.run)}. Self time on the device, forward and backward, while whole "
        "steps run. Shorter bars are faster.",
        list_sources([record]),
    )


def paper_figure(record: SourcedRecord[InLoop]) -> Figure | None:
    """Return the paper's figures, to compare their ratio with that of a record from a GPU."""
    if "capability" not in record.run:
        return None
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
        list_sources([record]),
    )


def prediction_figures(records: Sequence[SourcedRecord]) -> list[Figure]:
    figures = []
    for prediction in predict_gpus(records):
        values = {operator.title: operator.ms for operator in prediction.operators}
        names = prediction.operators[0].ms
        values["all operators"] = {n: sum(row[n] for row in values.values()) for n in names}
        figures.append(
            Figure(
                prediction.title,
                plots.bars({"": values}, "ms per optimizer step, calculated"),
                "Not measured: counted bytes divided by a bandwidth, plus a cost for each launch. "
                f"{prediction.notes[0]}",
                prediction.sources,
            )
        )
    return figures


def draw_profiles(profiles: Sequence[Profile]) -> Drawing:
    """Draw the README's picture: milliseconds per step of each operator, a panel per device."""
    panels = {}
    for profile in profiles:
        run, rows = profile.run, [row for row in profile.rows if row.part_of is None]
        title = f"{run['device']}, backend {run['backend']}, {run['blocks']} blocks"
        panels[title] = {row.title: {n: row.ms_per_step(n) for n in row.seconds} for row in rows}
    drawing = plots.bars(panels, "milliseconds per optimizer step (lower is better)", digits=0)
    drawing.set_figwidth(8)
    return drawing
