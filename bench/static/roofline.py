"""Estimated time of a call from its byte count, the bandwidth and a fixed cost per launch.

    seconds = launches * seconds per launch + bytes / bandwidth

Bytes and launches come from the committed records of `python -m bench traffic`, the bandwidth from
a record of the GPU, or from its datasheet if there is none.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from bench.cases import CASES, CASES_BY_OP, PROFILE, Case, Shape, calls_per_step
from bench.common import records as record_files
from bench.common.records import Run
from bench.static.traffic_record import TrafficRecord

JsonRecord = dict[str, Any]

# HBM of the SXM modules in bytes per second, NVIDIA's datasheets.
DATASHEET = {"h100": 3.35e12, "h200": 4.8e12}
# Assumption: a large copy reaches about nine tenths of the datasheet's figure; refreshes and
# switches between reads and writes take the rest.
COPY_SHARE = 0.9
# Assumption: time from the last store of a kernel to the first load of the next in its stream; the
# launch itself is hidden behind earlier kernels.
LAUNCH_SECONDS = 2e-6

DIRECTIONS = "fwd", "bwd"
FLOOR = "floor"  # every tensor once, without launches
# The operators of a step; RoPE and QK-Norm are counted as the one that replaces them.
STEP_OPERATORS = tuple(case for case in PROFILE if case.part_of is None)


class Calls(NamedTuple):
    """A number of calls of an operator in one direction."""

    op: str
    direction: str
    number: int = 1


class Cost(NamedTuple):
    """Bytes that calls move, and their launches."""

    bytes: float
    launches: int


@dataclass(frozen=True)
class Speed:
    """Bytes per second of a copy, the source of that figure, and seconds per launch."""

    bytes_per_second: float
    source: str
    launch_seconds: float = LAUNCH_SECONDS

    def seconds(self, cost: Cost) -> float:
        return cost.launches * self.launch_seconds + cost.bytes / self.bytes_per_second


def find_speed(
    gpu: str, records: Sequence[JsonRecord], launch_seconds: float = LAUNCH_SECONDS
) -> Speed:
    """Return the speed of "h100" or "h200": the newest measured bandwidth, else the datasheet's.

    MIG slices do not count, since they have a share of the bandwidth, nor does GH200, another GPU.
    """
    for record in reversed(records):
        device = record["run"].get("device") or ""
        matches = re.search(rf"\b{gpu}\b", device, re.IGNORECASE) and "MIG" not in device
        if matches and "copy_bytes_per_second" in record:
            source = f"measured on {device} ({describe_origin(record['run'])})"
            return Speed(record["copy_bytes_per_second"], source, launch_seconds)
    source = f"{COPY_SHARE:.0%} of the datasheet's {DATASHEET[gpu] / 1e12:g} TB/s, assumed"
    return Speed(COPY_SHARE * DATASHEET[gpu], source, launch_seconds)


def describe_origin(run: Run) -> str:
    """Return date and commit of a run, after the name of the committed file that has its record."""
    paths = sorted(record_files.RESULTS.glob("*.jsonl"))
    names = [p.name for p in paths if any(r["run"] == run for r in record_files.read(p))]
    return ", ".join([*names[:1], run["date"], str(run["commit"])])


def merge_newest_counts(records: Sequence[JsonRecord]) -> tuple[TrafficRecord, dict[str, Run]]:
    """Return the newest count of the whole profile, and {backend: run that counted it}.

    A backend that it lacks comes from the newest count of the same shape that has it.
    ValueError: no record counts the eager operators of the profile.
    """
    complete = select_complete_counts(records)
    if not complete:
        raise ValueError(
            f"no traffic record of the whole profile in {record_files.RESULTS.name}/*.jsonl; "
            "make one with python -m bench traffic --json bench/results/traffic.jsonl"
        )
    newest = complete[-1]
    sources = {
        backend: traffic
        for traffic in _read_traffic(records)
        if traffic.run["shape"] == newest.run["shape"]
        for backend in traffic.backends
        if covers_step(traffic, backend)
    }
    rows = [row for b, traffic in sources.items() for row in traffic.rows if row.backend == b]
    missing = {b: reason for b, reason in newest.missing.items() if b not in sources}
    merged = TrafficRecord(newest.run, rows, missing)
    return merged, {backend: traffic.run for backend, traffic in sources.items()}


def select_complete_counts(records: Sequence[JsonRecord]) -> list[TrafficRecord]:
    """Return the traffic records that have every eager operator of the profile."""
    return [traffic for traffic in _read_traffic(records) if covers_step(traffic, "reference")]


def _read_traffic(records: Sequence[JsonRecord]) -> list[TrafficRecord]:
    return [TrafficRecord.from_json(r) for r in records if r["kind"] == "traffic"]


def backend_of(implementation: str) -> str:
    """Return the name of an implementation in traffic records."""
    return "reference" if implementation == "eager" else implementation


def covers_step(traffic: TrafficRecord, implementation: str) -> bool:
    """Return whether every operator of a step was counted in an implementation."""
    return compute_cost(traffic, implementation, read_shape(traffic.run), step_calls(1)) is not None


def read_shape(run: Run) -> Shape:
    s = run["shape"]
    return Shape(**{**s, "segments": tuple(s["segments"]), "dtype": getattr(torch, s["dtype"])})


def scale_to_tokens(traffic: TrafficRecord, tokens: int) -> Shape:
    """Return the shape that was counted, with this total number of tokens."""
    return replace(read_shape(traffic.run), B=1, segments=(tokens,))


def step_calls(blocks: int, operators: Sequence[Case] = STEP_OPERATORS) -> list[Calls]:
    """Return the calls of operators in an optimizer step of one micro-batch."""
    return [
        Calls(case.op, direction, number)
        for case in operators
        for direction, number in zip(DIRECTIONS, calls_per_step(case, blocks), strict=True)
    ]


def compute_cost(
    traffic: TrafficRecord, implementation: str, shape: Shape, calls: Iterable[Calls]
) -> Cost | None:
    """Return the cost of calls at a shape, or None if one was not counted.

    The counted passes scale with those that must move: SwiGLU's with F / D. What a launch loads
    again comes from a cache. An operator that the implementation lacks costs the sum of the
    operators that it would replace.
    """
    moved, launches = 0.0, 0
    for op, direction, number in calls:
        if op not in CASES_BY_OP:
            return None
        must_move = getattr(CASES_BY_OP[op], direction)
        if implementation == FLOOR:
            moved += number * must_move(shape) * shape.pass_bytes
            continue
        column = backend_of(implementation), direction
        rows = {row.op: row for row in traffic.rows if (row.backend, row.direction) == column}
        parts = [op] if op in rows else [c.op for c in CASES if c.part_of == op]
        if not parts or not rows.keys() >= set(parts):
            return None
        passes = sum(rows[part].memory for part in parts)
        scale = must_move(shape) / must_move(read_shape(traffic.run))
        moved += number * passes * scale * shape.pass_bytes
        launches += number * sum(rows[part].launches for part in parts)
    return Cost(moved, launches)
