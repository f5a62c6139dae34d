"""Tables of the report as text: a function for each kind of record."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from bench.common import text_tables
from bench.common.machine import MachineRecord
from bench.common.text_tables import NOTHING, Row, format_scaled
from bench.measure import in_loop, sweep, train_step
from bench.measure import profile as profiles
from bench.measure.in_loop import InLoop
from bench.measure.profile import Profile
from bench.measure.sweep import Point
from bench.measure.train_step import Steps
from bench.report.select import (
    PARSERS,
    SourcedRecord,
    group_sweeps,
    list_failures,
    list_sources,
    newest,
)
from bench.static import comparison, kernel_resources, predict, roofline, traffic_record
from bench.static.kernel_resources import ResourceRecord
from bench.static.predict import PAPER_TOKENS, Prediction
from bench.static.traffic_record import TrafficRecord


@dataclass(frozen=True)
class Table:
    """Cells as strings, a last row with totals, and lines of notes and sources below the table."""

    title: str
    columns: Row
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    sources: Sequence[str] = ()
    total: Row | None = None

    def to_markdown(self) -> str:
        """Return the table and its lines, without the title."""
        rows = [*self.rows, self.total] if self.total else self.rows
        columns, *cells = ([plain_markdown(cell) for cell in row] for row in (self.columns, *rows))
        lines = (*self.notes, *(f"Source: {source}" for source in self.sources))
        bullets = [f"- {plain_markdown(line)}" for line in lines]
        return "\n".join([text_tables.format_markdown(columns, cells), "", *bullets])


def plain_markdown(line: str) -> str:
    """Return one line of Markdown that shows these characters."""
    return " ".join(line.replace("|", "\\|").replace("<", "&lt;").split())


def machine_overview(records: Sequence[SourcedRecord]) -> Table:
    """Return a row for each device with the newest values of its records."""
    shown = [r for kind in PARSERS for r in newest(records, kind)]
    runs: dict[str, dict[str, Any]] = {}
    newest_records = {}
    for record in sorted(shown, key=lambda r: r.run["date"]):
        if record.device:
            values = {name: value for name, value in record.run.items() if value}
            runs.setdefault(record.device, {}).update(values)
            newest_records[record.device] = record
    names = "instruction_set", "driver", "torch", "triton", "python"
    rows = [
        (
            *(device, ".".join(map(str, run.get("capability", ()))) or NOTHING),
            *(str(run.get(name, NOTHING)) for name in names),
        )
        for device, run in runs.items()
    ]
    columns = "device", "capability", *(name.replace("_", " ") for name in names)
    return Table("Machines", columns, rows, sources=list_sources(newest_records.values()))


def profile_table(record: SourcedRecord[Profile]) -> Table:
    profile = record.data
    *rows, total = profiles.format_cells(profile)
    title = f"{record.device}, backend {record.run['backend']}"
    notes = f"{profiles.format_headline(profile)}.", *profiles.format_notes(profile)
    return Table(title, profiles.PROFILE_COLUMNS, rows, notes, list_sources([record]), total)


def shorten_profile(table: Table) -> Table:
    """Return a profile's table without the times of single calls and without sources."""
    columns, *rows, total = (
        (row[0], row[1], *row[4:]) for row in (table.columns, *table.rows, table.total or ())
    )
    return replace(table, columns=columns, rows=rows, total=total, sources=())


def sweep_tables(records: Sequence[SourcedRecord]) -> list[Table]:
    """Return a table for each device, width and operator."""
    return [
        sweep_table(list(points))
        for group in group_sweeps(records)
        for _, points in groupby(group, key=lambda record: record.data.op)
    ]


def sweep_table(records: Sequence[SourcedRecord[Point]]) -> Table:
    """Return one operator's table: a row for each shape and implementation."""
    first = records[0]
    notes = (
        f"{text_tables.width_text(first.run['shape'])}; {_describe_methods(records)}. GB/s counts "
        "the bytes that a forward and a backward call must move, and % of copy compares it with "
        "the copy bandwidth measured in the same run. host us: time of the CPU in a forward call "
        "on one token.",
        *list_failures(records),
    )
    rows = [
        (text_tables.size_text(record.run["shape"]), *row)
        for record in records
        for row in sweep.format_rows(record.data)
    ]
    title, columns = f"{first.data.title}, {first.device}", ("shape", *sweep.POINT_COLUMNS)
    return Table(title, columns, rows, notes, list_sources(records))


def _describe_methods(records: Sequence[SourcedRecord[Point]]) -> str:
    """Return how the columns were timed, with their names if they were timed in several ways."""
    names_by_method: dict[str, dict[str, None]] = {}
    for record in records:
        for name, column in record.data.columns.items():
            method = f"{column.method}, medians of {record.run['repeats']}"
            names_by_method.setdefault(method, {})[name] = None
    if len(names_by_method) == 1:
        return next(iter(names_by_method))
    return "; ".join(f"{', '.join(names)}: {method}" for method, names in names_by_method.items())


def in_loop_table(record: SourcedRecord[InLoop]) -> Table:
    title = f"{record.run['preset']}, {record.device}"
    rows, notes = in_loop.format_rows(record.data), in_loop.format_notes(record.data)
    return Table(title, in_loop.IN_LOOP_COLUMNS, rows, notes, list_sources([record]))


def step_table(record: SourcedRecord[Steps]) -> Table:
    parts, breakdown = train_step.format_breakdown(record.data)
    columns = (*train_step.STEP_COLUMNS, *parts[3:])
    timings = train_step.format_rows(record.data)
    rows = [(*row, *own[3:]) for row, own in zip(timings, breakdown, strict=True)]
    title, notes = f"{record.run['preset']}, {record.device}", train_step.format_notes(record.data)
    return Table(title, columns, rows, notes, list_sources([record]))


def traffic_table(record: SourcedRecord[TrafficRecord]) -> Table:
    columns, rows, total = traffic_record.format_cells(record.data)
    title = text_tables.size_text(record.run["shape"])
    notes = traffic_record.format_notes(record.data)
    return Table(title, columns, rows, notes, list_sources([record]), total)


@dataclass(frozen=True)
class GpuPrediction:
    """The predicted operators of one step on a GPU."""

    title: str
    operators: list[Prediction]
    notes: Sequence[str]
    sources: Sequence[str]


def predict_gpus(records: Sequence[SourcedRecord]) -> list[GpuPrediction]:
    """Return the prediction for each GPU with a datasheet; none if no whole step was counted."""
    jsons = [record.json for record in records]
    if not roofline.select_complete_counts(jsons):
        return []
    traffic, runs = roofline.merge_newest_counts(jsons)
    sources = list_sources(record for record in records if record.run in runs.values())
    predictions = []
    for gpu in roofline.DATASHEET:
        bandwidth = roofline.find_bandwidth(gpu, jsons)
        operators = predict.predict_step(traffic, PAPER_TOKENS, bandwidth.bytes_per_second)
        notes = predict.format_notes(traffic, runs, bandwidth, roofline.LAUNCH_SECONDS)
        title = f"Predicted step, {gpu.upper()}, {PAPER_TOKENS:,} tokens"
        predictions.append(GpuPrediction(title, operators, notes, sources))
    return predictions


def prediction_tables(records: Sequence[SourcedRecord]) -> list[Table]:
    """Return the predicted step of each GPU, then measured and predicted calls of each device."""
    tables = []
    for prediction in predict_gpus(records):
        columns, rows, total = predict.format_cells(prediction.operators)
        notes, sources = prediction.notes, prediction.sources
        tables.append(Table(prediction.title, columns, rows, notes, sources, total))
    if not tables:
        return []
    jsons = [record.json for record in records]
    traffic, _ = roofline.merge_newest_counts(jsons)
    comparisons = comparison.compare_records(comparison.select_newest(jsons), traffic)
    for device, group in comparison.group_by_device(comparisons).items():
        columns, rows = comparison.format_cells(group)
        title, notes = f"Measured and predicted, {device}", comparison.COMPARISON_NOTES
        tables.append(Table(title, columns, rows, notes, tables[0].sources))
    return tables


def prediction_summary(records: Sequence[SourcedRecord]) -> Table:
    """Return the predicted totals of a step, a row for each GPU."""
    jsons = [record.json for record in records]
    traffic, _ = roofline.merge_newest_counts(jsons)
    bandwidths = {gpu: roofline.find_bandwidth(gpu, jsons) for gpu in roofline.DATASHEET}
    columns, rows = predict.format_summary(traffic, bandwidths)
    notes = (
        *(f"{gpu.upper()}: {bandwidth.source}." for gpu, bandwidth in bandwidths.items()),
        f"{PAPER_TOKENS:,} tokens, {traffic_record.PAPER_BLOCKS} blocks, "
        f"{1e6 * roofline.LAUNCH_SECONDS:g} us per launch, assumed. Calculated, not measured; "
        "python -m bench predict prints all assumptions.",
    )
    return Table("Predicted step", columns, rows, notes)


def machine_table(record: SourcedRecord[MachineRecord]) -> Table:
    rates = record.data
    columns = "device", "copy GB/s", f"matrix product TFLOP/s, {rates['matmul_dtype']}"
    copy = format_scaled(rates["copy_bytes_per_second"], 1e9)
    row = str(record.device), copy, format_scaled(rates["matmul_flops_per_second"], 1e12, 3)
    notes = ("The copy counts the bytes that it reads and the bytes that it writes.",)
    return Table(str(record.device), columns, [row], notes, list_sources([record]))


def resource_table(record: SourcedRecord[ResourceRecord]) -> Table:
    rows = kernel_resources.format_cells(record.data)
    notes = kernel_resources.format_notes(record.data)
    title, columns = text_tables.shape_text(record.run["shape"]), kernel_resources.RESOURCE_COLUMNS
    return Table(title, columns, rows, notes, list_sources([record]))
