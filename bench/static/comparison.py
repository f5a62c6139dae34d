"""Comparison of measured times with the times predicted from bytes, bandwidth and launches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bench.cases import Shape
from bench.common import records as record_files
from bench.common.records import Run
from bench.common.text_tables import Row
from bench.measure.in_loop import InLoop
from bench.measure.profile import Profile
from bench.static import roofline
from bench.static.roofline import DIRECTIONS, LAUNCH_SECONDS, Calls, JsonRecord, Speed
from bench.static.traffic_record import TrafficRecord
from model.config import FIELDS, Config

COMPARISON_COLUMNS = (
    *("operator", "direction", "implementation", "predicted ms", "measured ms"),
    *("measured / predicted", "shape", "record"),
)
COMPARISON_NOTES = (
    "Predicted: the counted bytes divided by the copy bandwidth of the same record (for a step in "
    "the loop, of the newest record of that machine); on a GPU, the launches too.",
    "The copy moves 256 MiB or more, while the tensors of a call may stay in cache, above all on a "
    "CPU: ratios below 1 are possible.",
)


@dataclass(frozen=True)
class Measurement:
    """Measured seconds of calls. direction: fwd, bwd; step: the calls of a whole step."""

    title: str
    direction: str
    implementation: str
    calls: Sequence[Calls]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """A measurement and its prediction; the texts of its device, shape and record."""

    device: str
    shape: str
    source: str
    measured: Measurement
    predicted_seconds: float

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured.seconds / self.predicted_seconds


def compare_records(
    records: Sequence[JsonRecord], traffic: TrafficRecord, launch_seconds: float = LAUNCH_SECONDS
) -> list[Comparison]:
    """Compare each call in "profile" and "ops" records, and each step in "in_loop" records.

    The bandwidth is the copy of the same record; for a loop, the newest of the same machine. On a
    CPU a launch costs nothing. Calls that were not counted, and other dtypes than the counted one,
    are left out.
    """
    counted_dtype = roofline.read_shape(traffic.run).dtype
    copy_key = "copy_bytes_per_second"
    copies = {_device_text(r["run"]): r[copy_key] for r in records if copy_key in r}
    comparisons: list[Comparison] = []
    for record in records:
        if record["kind"] not in MEASUREMENTS:
            continue
        run, device, shape = record["run"], _device_text(record["run"]), _read_shape(record["run"])
        copy = record.get(copy_key) or copies.get(device)
        if copy is None or shape.dtype != counted_dtype:
            continue
        texts = device, _shape_text(shape), f"{record['kind']}, {run['date'][:19]}, {run['commit']}"
        speed = Speed(copy, texts[-1], launch_seconds if "capability" in run else 0.0)
        for measured in MEASUREMENTS[record["kind"]](record):
            cost = roofline.compute_cost(traffic, measured.implementation, shape, measured.calls)
            if cost is not None:
                comparisons.append(Comparison(*texts, measured, speed.seconds(cost)))
    return comparisons


def _list_profile(record: JsonRecord) -> Iterator[Measurement]:
    profile = Profile.from_json(record)
    for row in profile.rows:
        yield from _list_calls(row.op, row.title, "eager", row.seconds["eager"])
        yield from _list_calls(row.op, row.title, profile.run["backend"], row.seconds["fused"])


def _list_point(record: JsonRecord) -> Iterator[Measurement]:
    for name, column in record["columns"].items():
        if "failed" not in column:  # columns of older records may only have the reason
            yield from _list_calls(record["op"], record["title"], name, column["seconds"][:2])


def _list_calls(
    op: str, title: str, implementation: str, seconds: Sequence[float]
) -> Iterator[Measurement]:
    for direction, measured in zip(DIRECTIONS, seconds, strict=True):
        yield Measurement(title, direction, implementation, [Calls(op, direction)], measured)


def _list_steps(record: JsonRecord) -> Iterator[Measurement]:
    """Yield a measurement of all operators of a step for each implementation."""
    loop = InLoop.from_json(record)
    for name in dict.fromkeys(row.implementation for row in loop.rows):
        rows = [row for row in loop.rows if row.implementation == name]
        forward = (Calls(row.op, "fwd", row.forward_calls) for row in rows)
        backward = (Calls(row.op, "bwd", row.backward_calls) for row in rows)
        title, seconds = f"{loop.run['preset']}, in the loop", loop.total_ms(name) / 1e3
        yield Measurement(title, "step", name, [*forward, *backward], seconds)


# kind of a record: its measurements
MEASUREMENTS = {"profile": _list_profile, "ops": _list_point, "in_loop": _list_steps}


def _read_shape(run: Run) -> Shape:
    """Return the shape of a run, or that of the operators in its training step."""
    if "config" not in run:
        return roofline.read_shape(run)
    config = Config(**{k: v for k, v in run["config"].items() if k in FIELDS})
    return Shape(
        B=config.micro_batch or config.batch,
        segments=config.segments,
        D=config.dim,
        H=config.heads,
        F=config.ffn,
        dtype=torch.float32 if config.precision == "fp32" else torch.bfloat16,
    )


def _device_text(run: Run) -> str:
    threads = "" if "capability" in run else f", {run.get('threads')} threads"
    return f"{run.get('device')}{threads}"


def _shape_text(shape: Shape) -> str:
    segments = "+".join(map(str, shape.segments))
    dtype = str(shape.dtype).removeprefix("torch.")
    return f"{shape.B} x {segments} x {shape.D}, {dtype}"


def select_newest(records: Sequence[JsonRecord]) -> list[JsonRecord]:
    """Return the last record of each measurement, in the order of `records`."""
    newest = {record_files.measurement_key(record): record for record in records}
    return [r for r in records if r is newest[record_files.measurement_key(r)]]


def format_cells(comparisons: Sequence[Comparison]) -> dict[str, list[Row]]:
    """Return {device: rows below COMPARISON_COLUMNS}: predicted and measured time of each call."""
    rows: dict[str, list[Row]] = {}
    for c in comparisons:
        measured = c.measured
        times = (f"{1e3 * seconds:.4f}" for seconds in (c.predicted_seconds, measured.seconds))
        rows.setdefault(c.device, []).append(
            (
                *(measured.title, measured.direction, measured.implementation),
                *(*times, f"{c.ratio:.2f}", c.shape, c.source),
            )
        )
    return rows
