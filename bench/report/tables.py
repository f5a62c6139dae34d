"""Tables of the report as text: a function for each kind of record."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bench.common import text_tables
from bench.common.machine import MachineRecord
from bench.common.text_tables import NOTHING, Table, format_scaled
from bench.measure import in_loop, sweep, train_step
from bench.measure import profile as profiles
from bench.report import select
from bench.report.select import SourcedRecord, list_sources, newest
from bench.static import comparison, kernel_resources, predict, roofline, traffic_record
from bench.static.predict import PAPER_TOKENS, Prediction


def machine_overview(records: Sequence[SourcedRecord]) -> Table:
    """Return a row for each device with the newest values of its records."""
    shown = [r for kind in select.RECORD_CLASSES for r in newest(records, kind) if r.device]
    names = "capability", "instruction_set", "driver", "torch", "triton", "python"
    rows, last_records = [], []
    by_date = sorted(shown, key=lambda record: record.run["date"])
    for device, group in select.group_by(by_date, lambda record: str(record.device)).items():
        run: dict[str, Any] = {name: NOTHING for name in names}
        for record in group:
            run |= {name: value for name, value in record.run.items() if value}
        run["capability"] = ".".join(map(str, run["capability"]))
        rows.append((device, *(str(run[name]) for name in names)))
        last_records.append(group[-1])
    columns = "device", *(name.replace("_", " ") for name in names)
    return Table("Machines", columns, rows, sources=list_sources(last_records))


def profile_table(record: SourcedRecord[profiles.Profile]) -> Table:
    profile = record.data
    *rows, total = profiles.format_cells(profile)
    title = f"{record.device}, backend {record.run['backend']}"
    notes = f"{profiles.format_headline(profile)}.", *profiles.format_notes(profile)
    return Table(title, profiles.PROFILE_COLUMNS, rows, notes, total)


def shorten_profile(table: Table) -> Table:
    """Return a profile's table without the times of single calls."""
    columns, *rows, total = (
        (row[0], row[1], *row[4:]) for row in (table.columns, *table.rows, table.total or ())
    )
    return replace(table, columns=columns, rows=rows, total=total)


def sweep_tables(records: Sequence[SourcedRecord]) -> list[Table]:
    """Return a table for each device, width and operator."""
    return [
        sweep_table(points)
        for group in select.group_sweeps(records)
        for points in select.group_by(group, lambda record: record.data.op).values()
    ]


def sweep_table(records: Sequence[SourcedRecord[sweep.Point]]) -> Table:
    """Return one operator's table: a row for each shape and implementation."""
    first = records[0]
    notes = (
        f"{text_tables.width_text(first.run['shape'])}; {_describe_methods(records)}. GB/s counts "
        "the bytes that a forward and a backward call must move, and % of copy compares it with "
        "the copy bandwidth measured in the same run. host us: time of the CPU in a forward call "
        "on one token.",
        *select.list_failures(records),
    )
    rows = [
        (text_tables.size_text(record.run["shape"]), *row)
        for record in records
        for row in sweep.format_rows(record.data)
    ]
    title, columns = f"{first.data.title}, {first.device}", ("shape", *sweep.POINT_COLUMNS)
    return Table(title, columns, rows, notes, sources=list_sources(records))


def _describe_methods(records: Sequence[SourcedRecord[sweep.Point]]) -> str:
    """Return how the columns were timed, with their names if they were timed in several ways."""
    names_by_method: dict[str, dict[str, None]] = {}
    for record in records:
        for name, column in record.data.columns.items():
            method = f"{column.method}, medians of {record.run['repeats']}"
            names_by_method.setdefault(method, {})[name] = None
    if len(names_by_method) == 1:
        return next(iter(names_by_method))
    return "; ".join(f"{', '.join(names)}: {method}" for method, names in names_by_method.items())


def in_loop_table(record: SourcedRecord[in_loop.InLoop]) -> Table:
    title = f"{record.run['preset']}, {record.device}"
    rows, notes = in_loop.format_rows(record.data), in_loop.format_notes(record.data)
    return Table(title, in_loop.IN_LOOP_COLUMNS, rows, notes)


def step_table(record: SourcedRecord[train_step.Steps]) -> Table:
    parts, breakdown = train_step.format_breakdown(record.data)
    timings = train_step.format_rows(record.data)
    rows = [(*row, *own[3:]) for row, own in zip(timings, breakdown, strict=True)]
    title, columns = f"{record.run['preset']}, {record.device}", train_step.STEP_COLUMNS
    return Table(title, (*columns, *parts[3:]), rows, train_step.format_notes(record.data))


def traffic_table(record: SourcedRecord[traffic_record.TrafficRecord]) -> Table:
    columns, rows, total = traffic_record.format_cells(record.data)
    title = text_tables.size_text(record.run["shape"])
    return Table(title, columns, rows, traffic_record.format_notes(record.data), total)


def predict_gpus(records: Sequence[SourcedRecord]) -> list[tuple[Table, list[Prediction]]]:
    """Return the predicted step of each GPU with a datasheet; none if no whole step was counted."""
    jsons = [record.json for record in records]
    if not roofline.select_complete_counts(jsons):
        return []
    traffic, runs = roofline.merge_newest_counts(jsons)
    sources = list_sources(record for record in records if record.run in runs.values())
    predictions = []
    for gpu in roofline.DATASHEET:
        speed = roofline.find_speed(gpu, jsons)
        operators = predict.predict_step(traffic, PAPER_TOKENS, speed)
        columns, rows, total = predict.format_cells(operators)
        notes = predict.format_notes(traffic, runs, speed)
        title = f"Predicted step, {gpu.upper()}, {PAPER_TOKENS:,} tokens"
        predictions.append((Table(title, columns, rows, notes, total, sources), operators))
    return predictions


def prediction_tables(records: Sequence[SourcedRecord]) -> list[Table]:
    """Return the predicted step of each GPU, then measured and predicted calls of each device."""
    tables = [table for table, _ in predict_gpus(records)]
    if not tables:
        return []
    jsons = [record.json for record in records]
    traffic, _ = roofline.merge_newest_counts(jsons)
    comparisons = comparison.compare_records(comparison.select_newest(jsons), traffic)
    columns, notes = comparison.COMPARISON_COLUMNS, comparison.COMPARISON_NOTES
    for device, rows in comparison.format_cells(comparisons).items():
        title = f"Measured and predicted, {device}"
        tables.append(Table(title, columns, rows, notes, sources=tables[0].sources))
    return tables


def prediction_summary(records: Sequence[SourcedRecord]) -> Table:
    """Return the predicted totals of a step, a row for each GPU."""
    jsons = [record.json for record in records]
    traffic, _ = roofline.merge_newest_counts(jsons)
    speeds = {gpu: roofline.find_speed(gpu, jsons) for gpu in roofline.DATASHEET}
    columns, rows = predict.format_summary(traffic, speeds)
    notes = (
        *(f"{gpu.upper()}: {speed.source}." for gpu, speed in speeds.items()),
        f"{PAPER_TOKENS:,} tokens, {traffic_record.PAPER_BLOCKS} blocks, "
        f"{1e6 * roofline.LAUNCH_SECONDS:g} us per launch, assumed. Calculated, not measured; "
        "python -m bench predict prints all assumptions.",
    )
    return Table("Predicted step", columns, rows, notes)


def machine_table(record: SourcedRecord[MachineRecord]) -> Table:
    rates = record.data
    columns = "device", "copy GB/s", f"matrix product TFLOP/s, {rates.matmul_dtype}"
    copy = format_scaled(rates.copy_bytes_per_second, 1e9)
    row = str(record.device), copy, format_scaled(rates.matmul_flops_per_second, 1e12, 3)
    notes = ("The copy counts the bytes that it reads and the bytes that it writes.",)
    return Table(str(record.device), columns, [row], notes)


def resource_table(record: SourcedRecord[kernel_resources.ResourceRecord]) -> Table:
    title, columns = text_tables.shape_text(record.run["shape"]), kernel_resources.RESOURCE_COLUMNS
    rows = kernel_resources.format_cells(record.data)
    return Table(title, columns, rows, kernel_resources.format_notes(record.data))


TABLES: dict[str, Callable[[SourcedRecord[Any]], Table]] = {
    "profile": profile_table,
    "in_loop": in_loop_table,
    "step": step_table,
    "traffic": traffic_table,
    "machine": machine_table,
    "resources": resource_table,
}


def make_tables(records: Sequence[SourcedRecord]) -> dict[str, list[Table]]:
    """Return {kind: the tables of its newest records}."""
    tables = {
        kind: [replace(make(r), sources=list_sources([r])) for r in newest(records, kind)]
        for kind, make in TABLES.items()
    }
    return {**tables, "ops": sweep_tables(records), "predict": prediction_tables(records)}
