"""Tables of the report as text: a function for each kind of record."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from bench.cases import PAPER_MS
from bench.common import text_tables
from bench.common.machine import MachineRecord
from bench.common.records import Run
from bench.common.text_tables import NOTHING, Row
from bench.measure import profile as profiles
from bench.measure.in_loop import InLoop
from bench.measure.profile import Profile
from bench.measure.sweep import Point
from bench.measure.train_step import Steps, StepTiming
from bench.report.select import (
    KERNEL_BACKENDS,
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


def format_ratio(base: float | None, value: float) -> str:
    return f"{base / value:.2f}x" if base else NOTHING


def format_scaled(value: float | None, unit: float, digits: int = 1) -> str:
    return NOTHING if value is None else f"{value / unit:,.{digits}f}"


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
    *rows, total = profiles.cells(profile)
    title = f"{record.device}, backend {record.run['backend']}"
    notes = f"{profiles.headline(profile)}.", *profiles.notes(profile)
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
        for sweep in group_sweeps(records)
        for _, points in groupby(sweep, key=lambda record: record.data.op)
    ]


def sweep_table(records: Sequence[SourcedRecord[Point]]) -> Table:
    """Return one operator's table: a row for each shape and implementation."""
    columns = (
        *("shape", "implementation", "forward us", "backward us", "both us", "host us"),
        *("launches fwd/bwd", "GB/s", "% of copy", "vs eager"),
    )
    first = records[0]
    notes = (
        f"{text_tables.width_text(first.run['shape'])}; {_describe_methods(records)}. GB/s counts "
        "the bytes that a forward and a backward call must move, and % of copy compares it with "
        "the copy bandwidth measured in the same run. host us: time of the CPU in a forward call "
        "on one token.",
        *list_failures(records),
    )
    rows = [row for record in records for row in _point_rows(record.data)]
    title = f"{first.data.title}, {first.device}"
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


def _point_rows(point: Point) -> Iterator[Row]:
    """Yield a row for each implementation at one shape, the failed ones last."""
    size = text_tables.size_text(point.run["shape"])
    eager = point.columns["eager"].seconds[2] if "eager" in point.columns else None
    for name, column in point.columns.items():
        rate = point.bytes_per_second(name)
        yield (
            *(size, name),
            *(format_scaled(s, 1e-6) for s in (*column.seconds, column.host_seconds)),
            " / ".join(map(str, column.launches)) if column.launches else NOTHING,
            f"{rate / 1e9:.1f}",
            f"{100 * rate / point.copy_bytes_per_second:.0f}%",
            format_ratio(eager, column.seconds[2]),
        )
    for name in point.failed:
        yield (size, name, "failed", *[NOTHING] * 7)


def in_loop_table(record: SourcedRecord[InLoop]) -> Table:
    columns = (
        *("operator", "implementation", "calls fwd/bwd", "forward ms/step", "backward ms/step"),
        "both ms/step",
    )
    rows: list[Row] = [
        (
            *(row.title, row.implementation, f"{row.forward_calls} / {row.backward_calls}"),
            *(f"{ms:.2f}" for ms in (row.forward_ms, row.backward_ms, row.ms)),
        )
        for row in record.data.rows
    ]
    totals = sum_operators(record.data)
    rows += [("all operators", name, "", "", "", f"{ms:.2f}") for name, ms in totals.items()]
    steps = ", ".join(f"{name} {ms:.1f} ms" for name, ms in record.data.step_ms.items())
    notes = [
        f"{preset_text(record.run)}. Self time of the operators on the device within whole "
        f"training steps. A whole step: {steps}."
    ]
    for name in KERNEL_BACKENDS:
        if name in totals and "eager" in totals:
            ratio = format_ratio(totals["eager"], totals[name])
            notes.append(f"The operators on {name} are {ratio} faster than eager PyTorch.")
    if "capability" in record.run:
        notes.append(
            "The paper's own figures, on 8 H100 at its batch, not this machine: "
            f"{PAPER_MS['eager']} ms eager, {PAPER_MS['fused']} ms with its kernels."
        )
    title = f"{record.run['preset']}, {record.device}"
    return Table(title, columns, rows, notes, list_sources([record]))


def sum_operators(result: InLoop) -> dict[str, float]:
    """Return {implementation: milliseconds per step of all its operators}."""
    names = dict.fromkeys(row.implementation for row in result.rows)
    return {name: result.total_ms(name) for name in names}


def preset_text(run: Run) -> str:
    """Return a training run's preset and the fields of its configuration that decide the time."""
    names = "depth", "dim", "heads", "ffn", "batch", "precision"
    fields = (f"{name} {run['config'][name]}" for name in names if name in run["config"])
    return ", ".join((run["preset"], *fields))


def step_table(record: SourcedRecord[Steps]) -> Table:
    rows, run = record.data.rows, record.run
    parts = list(dict.fromkeys(part for row in rows for part in row.breakdown))
    columns = (
        *("residual", "implementation", "checkpointing", "loader ms", "gradients ms", "update ms"),
        *("step ms", "tokens/s", "TFLOP/s", "% of matmul", "peak GB"),
        *(f"{part} ms" for part in parts),
    )
    peak_rate = run.get("matmul_flops_per_second")
    notes = (
        f"{preset_text(run)}; medians of {run['repeats']} steps. The loader's time is not part of "
        "a step. % of matmul: TFLOP/s compared with a matrix product measured in the same run. "
        "The parts are from a profiled step; launch gaps: the time of a step without the profiler "
        "beyond the other parts.",
        *(f"{variant}: {reason}" for variant, reason in record.data.failed.items()),
    )
    cells = [_step_cells(row, parts, peak_rate) for row in rows]
    title = f"{run['preset']}, {record.device}"
    return Table(title, columns, cells, notes, list_sources([record]))


def _step_cells(row: StepTiming, parts: Sequence[str], peak_rate: float | None) -> Row:
    rate = row.flops / row.step
    return (
        *(row.residual, row.implementation, row.checkpointing),
        *(format_scaled(s, 1e-3) for s in (row.loader, row.gradients, row.update, row.step)),
        format_scaled(row.tokens_per_second, 1, 0),
        format_scaled(rate, 1e12, 3),
        f"{100 * rate / peak_rate:.0f}%" if peak_rate else NOTHING,
        format_scaled(row.peak_bytes, 1e9, 2),
        *(format_scaled(row.breakdown.get(part), 1e-3) for part in parts),
    )


def traffic_table(record: SourcedRecord[TrafficRecord]) -> Table:
    columns, rows, total = traffic_record.format_cells(record.data)
    title, notes = (
        text_tables.size_text(record.run["shape"]),
        traffic_record.format_notes(record.data),
    )
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
    rows, notes = (
        kernel_resources.format_cells(record.data),
        kernel_resources.format_notes(record.data),
    )
    title, columns = text_tables.shape_text(record.run["shape"]), kernel_resources.RESOURCE_COLUMNS
    return Table(title, columns, rows, notes, list_sources([record]))
