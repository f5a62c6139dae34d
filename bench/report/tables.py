"""Tables of the report as text: a function for each kind of record."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bench.common import text_tables
from bench.common.machine import MachineRecord
from bench.common.text_tables import NOTHING, Row, Table, format_scaled
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


def shorten_profile(table: Table) -> Table:
    """Return a profile's table without the times of single calls and the sources."""
    columns, *rows, total = (
        (row[0], row[1], *row[4:]) for row in (table.columns, *table.rows, table.total or ())
    )
    return replace(table, columns=columns, rows=rows, total=total, sources=())


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


def make_step_table(steps: train_step.Steps) -> Table:
    """Return the times of each variant and their breakdown in one table."""
    parts, breakdown = train_step.format_breakdown(steps)
    timings, columns = train_step.format_rows(steps), train_step.STEP_COLUMNS
    rows = [(*row, *own[3:]) for row, own in zip(timings, breakdown, strict=True)]
    return Table("Steps", (*columns, *parts[3:]), rows, train_step.format_notes(steps))


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
    columns: Row = ()
    rows: list[Row] = []
    for gpu, speed in speeds.items():
        operators = predict.predict_step(traffic, PAPER_TOKENS, speed)
        columns, _, total = predict.format_cells(operators)
        rows.append((gpu.upper(), *total[2:]))
    columns = "a step by calculation", *columns[2:]
    notes = (
        *(f"{gpu.upper()}: {speed.source}." for gpu, speed in speeds.items()),
        f"{PAPER_TOKENS:,} tokens, {traffic_record.PAPER_BLOCKS} blocks, "
        f"{1e6 * roofline.LAUNCH_SECONDS:g} us per launch, assumed. Calculated, not measured; "
        "python -m bench predict prints all assumptions.",
    )
    return Table("Predicted step", columns, rows, notes)


def make_machine_table(rates: MachineRecord) -> Table:
    columns = "device", "copy GB/s", f"matrix product TFLOP/s, {rates.matmul_dtype}"
    copy = format_scaled(rates.copy_bytes_per_second, 1e9)
    row = rates.run["device"], copy, format_scaled(rates.matmul_flops_per_second, 1e12, 3)
    notes = ("The copy counts the bytes that it reads and the bytes that it writes.",)
    return Table("Machine", columns, [row], notes)


def _preset_title(record: SourcedRecord) -> str:
    return f"{record.run['preset']}, {record.device}"


# kind: (table of a record, its title in the report)
TABLES: dict[str, tuple[Callable[[Any], Table], Callable[[SourcedRecord], str]]] = {
    "profile": (profiles.make_table, lambda r: f"{r.device}, backend {r.run['backend']}"),
    "in_loop": (in_loop.make_table, _preset_title),
    "step": (make_step_table, _preset_title),
    "traffic": (traffic_record.make_table, lambda r: text_tables.size_text(r.run["shape"])),
    "machine": (make_machine_table, lambda r: str(r.device)),
    "resources": (kernel_resources.make_table, lambda r: text_tables.shape_text(r.run["shape"])),
}


def record_table(record: SourcedRecord) -> Table:
    """Return the table of a record of one of the kinds in TABLES."""
    make, title = TABLES[record.kind]
    return replace(make(record.data), title=title(record), sources=list_sources([record]))


def make_tables(records: Sequence[SourcedRecord]) -> dict[str, list[Table]]:
    """Return {kind: the tables of its newest records}."""
    tables = {kind: [record_table(r) for r in newest(records, kind)] for kind in TABLES}
    return {**tables, "ops": sweep_tables(records), "predict": prediction_tables(records)}
