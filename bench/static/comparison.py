"""Comparison of measured times with the times predicted from bytes, bandwidth and launches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import Shape
from bench.common import records as record_files
from bench.common.records import Run
from bench.common.text_tables import Row
from bench.measure.in_loop import InLoopTiming
from bench.measure.profile import Profile
from bench.static import roofline
from bench.static.roofline import DIRECTIONS, LAUNCH_SECONDS, JsonRecord
from bench.static.traffic_record import TrafficRecord
from model.config import FIELDS, Config

COMPARISON_NOTES = (
    "Predicted: the counted bytes divided by the copy bandwidth of the same record (for a step in "
    "the loop, of the newest record of that machine); on a GPU, the launches too.",
    "The copy moves 256 MiB or more, while the tensors of a call may stay in cache, above all on a "
    "CPU: ratios below 1 are possible.",
)


@dataclass(frozen=True)
class Comparison:
    """A measurement and its prediction. direction: fwd, bwd; step: the calls of a whole step."""

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
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured_seconds / self.predicted_seconds


def compare_records(
    records: Sequence[JsonRecord], traffic: TrafficRecord, launch_seconds: float = LAUNCH_SECONDS
) -> list[Comparison]:
    """Compare each call in "profile" and "ops" records, and each step in "in_loop" records.

    The bandwidth is the copy of the same record; for a loop, the newest of the same machine. On a
    CPU a launch costs nothing. Calls that were not counted, and other dtypes than the counted one,
    are left out.
    """
    comparisons: list[Comparison] = []
    for record in records:
        if record["kind"] == "in_loop":
            comparisons += _compare_loop(record, records, traffic, launch_seconds)
        elif record["kind"] in ("profile", "ops"):
            comparisons += _compare_calls(record, traffic, launch_seconds)
    return comparisons


def _compare_calls(
    record: JsonRecord, traffic: TrafficRecord, launch_seconds: float
) -> Iterator[Comparison]:
    shape = roofline.read_shape(record["run"])
    if shape.dtype != roofline.read_shape(traffic.run).dtype:
        return
    speed = record["copy_bytes_per_second"], launch_seconds if _on_gpu(record) else 0.0
    for op, title, implementation, seconds in _list_calls(record):
        for direction, measured in zip(DIRECTIONS, seconds, strict=True):
            cost = roofline.compute_call_cost(traffic, op, direction, implementation, shape)
            if cost is not None:
                yield Comparison(
                    device=_device_text(record["run"]),
                    op=op,
                    title=title,
                    direction=direction,
                    implementation=implementation,
                    shape=_shape_text(shape),
                    predicted_seconds=cost.seconds(*speed),
                    measured_seconds=measured,
                    source=_source_text(record),
                )


def _list_calls(record: JsonRecord) -> Iterator[tuple[str, str, str, Sequence[float]]]:
    """Yield op, title, implementation and (fwd, bwd) seconds of a "profile" or "ops" record."""
    if record["kind"] == "ops":  # some columns of older records only say why they failed
        for name, column in record["columns"].items():
            if "failed" not in column:
                yield record["op"], record["title"], name, column["seconds"][:2]
        return
    profile = Profile.from_json(record)
    for row in profile.rows:
        yield row.op, row.title, "eager", row.seconds["eager"]
        yield row.op, row.title, profile.run["backend"], row.seconds["fused"]


def _compare_loop(
    record: JsonRecord,
    records: Sequence[JsonRecord],
    traffic: TrafficRecord,
    launch_seconds: float,
) -> Iterator[Comparison]:
    run, shape = record["run"], _training_shape(record["run"]["config"])
    copies = [
        other["copy_bytes_per_second"]
        for other in records
        if _device_text(other["run"]) == _device_text(run) and "copy_bytes_per_second" in other
    ]
    if not copies or shape.dtype != roofline.read_shape(traffic.run).dtype:
        return
    speed = copies[-1], launch_seconds if _on_gpu(record) else 0.0
    timings = [InLoopTiming(**row) for row in record["rows"]]
    for name in dict.fromkeys(timing.implementation for timing in timings):
        rows = [timing for timing in timings if timing.implementation == name]
        predicted = _predict_calls(rows, traffic, shape, speed)
        if predicted is not None:
            yield Comparison(
                device=_device_text(run),
                op="all",
                title=f"{run['preset']}, in the loop",
                direction="step",
                implementation=name,
                shape=_shape_text(shape),
                predicted_seconds=predicted,
                measured_seconds=sum(row.ms for row in rows) / 1e3,
                source=_source_text(record),
            )


def _training_shape(fields: dict[str, Any]) -> Shape:
    """Return the shape of the operators of a training step, from the fields of its Config."""
    config = Config(**{k: v for k, v in fields.items() if k in FIELDS})
    return Shape(
        B=config.micro_batch or config.batch,
        segments=config.segments,
        D=config.dim,
        H=config.heads,
        F=config.ffn,
        dtype=torch.float32 if config.precision == "fp32" else torch.bfloat16,
    )


def _predict_calls(
    rows: Sequence[InLoopTiming],
    traffic: TrafficRecord,
    shape: Shape,
    speed: tuple[float, float],
) -> float | None:
    """Return the seconds of all calls of the rows, or None if one was not counted."""
    total = 0.0
    for row in rows:
        calls_of_directions = row.forward_calls, row.backward_calls
        for direction, calls in zip(DIRECTIONS, calls_of_directions, strict=True):
            cost = roofline.compute_call_cost(traffic, row.op, direction, row.implementation, shape)
            if cost is None:
                return None
            total += calls * cost.seconds(*speed)
    return total


def _on_gpu(record: JsonRecord) -> bool:
    return "capability" in record["run"]


def _device_text(run: Run) -> str:
    threads = "" if "capability" in run else f", {run.get('threads')} threads"
    return f"{run.get('device')}{threads}"


def _shape_text(shape: Shape) -> str:
    segments = "+".join(map(str, shape.segments))
    dtype = str(shape.dtype).removeprefix("torch.")
    return f"{shape.B} x {segments} x {shape.D}, {dtype}"


def _source_text(record: JsonRecord) -> str:
    run = record["run"]
    return f"{record['kind']}, {run['date'][:19]}, {run['commit']}"


def select_newest(records: Sequence[JsonRecord]) -> list[JsonRecord]:
    """Return the last record of each measurement, in the order of `records`."""
    newest: dict[str, JsonRecord] = {}
    for record in records:
        key = record_files.measurement_key(record)
        newest.pop(key, None)
        newest[key] = record
    return list(newest.values())


def group_by_device(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.device, []).append(comparison)
    return groups


def format_cells(comparisons: Sequence[Comparison]) -> tuple[Row, list[Row]]:
    """Return columns and rows: predicted and measured time of each call."""
    columns = (
        *("operator", "direction", "implementation", "predicted ms", "measured ms"),
        *("measured / predicted", "shape", "record"),
    )
    rows: list[Row] = [
        (
            *(c.title, c.direction, c.implementation),
            *(f"{1e3 * s:.4f}" for s in (c.predicted_seconds, c.measured_seconds)),
            *(f"{c.ratio:.2f}", c.shape, c.source),
        )
        for c in comparisons
    ]
    return columns, rows
