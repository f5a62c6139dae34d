"""What a call costs by calculation: its counted bytes at a bandwidth, and so much a launch.

    seconds = launches * seconds of a launch + bytes / bandwidth

Bytes and launches come from the committed traffic records (bench.traffic), the bandwidth from a
record of that GPU, or from its datasheet where there is none.
"""

import re
from dataclasses import dataclass, replace

import torch

from bench.cases import CASES, PROFILE, Shape, calls_per_step
from bench.common import records
from bench.static.traffic import TrafficRecord

# HBM of the SXM modules in bytes per second, NVIDIA's datasheets.
DATASHEET = {"h100": 3.35e12, "h200": 4.8e12}
# An assumption: a large copy reaches about nine tenths of the datasheet's figure, for refreshes and
# turns between reading and writing take the rest.
COPY_SHARE = 0.9
# An assumption: from the last store of a kernel to the first load of the next in its stream, with
# the launch itself hidden behind the kernels before.
LAUNCH_SECONDS = 2e-6

DIRECTIONS = "fwd", "bwd"
FLOOR = "floor"  # every tensor once, and no launch
COLUMNS = {"eager": "reference"}  # of a TrafficRecord, for an implementation of another name
# The operators of a step; RoPE and QK-Norm are the one that they make.
OPERATORS = tuple(case for case in PROFILE if case.part_of is None)


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second of a copy, and where the figure comes from."""

    bytes_per_second: float
    source: str


def bandwidth(gpu, found):
    """Of "h100" or "h200": the newest of the records `found` that measured one, else the datasheet.

    A MIG slice has a share of the bandwidth, and a GH200 is another GPU: neither counts.
    """
    for record in reversed(found):
        device = record["run"].get("device") or ""
        named = re.search(rf"\b{gpu}\b", device, re.IGNORECASE) and "MIG" not in device
        if named and "copy_bytes_per_second" in record:
            source = f"measured on {device} ({origin(record['run'])})"
            return Bandwidth(record["copy_bytes_per_second"], source)
    source = f"{COPY_SHARE:.0%} of the datasheet's {DATASHEET[gpu] / 1e12:g} TB/s, assumed"
    return Bandwidth(COPY_SHARE * DATASHEET[gpu], source)


def origin(run):
    """File, date and commit of a committed record; without the file where it is in none."""
    paths = sorted(records.RESULTS.glob("*.jsonl"))
    names = [p.name for p in paths if any(r["run"] == run for r in records.read(p))]
    return ", ".join([*names[:1], run["date"], str(run["commit"])])


def newest_count(found):
    """The newest traffic record of the whole profile: (TrafficRecord, {backend: run of its record}).

    A column that it lacks is the newest of its shape.
    ValueError: no record counts the eager operators of the profile.
    """
    whole = whole_counts(found)
    if not whole:
        raise ValueError(
            f"no traffic record of the whole profile in {records.RESULTS.name}/*.jsonl; "
            "python -m bench traffic --json bench/results/traffic.jsonl makes one"
        )
    newest = whole[-1]
    columns = {}
    counts = map(TrafficRecord.from_json, (r for r in found if r["kind"] == "traffic"))
    for count in (c for c in counts if c.run["shape"] == newest.run["shape"]):
        for backend in dict.fromkeys(row.backend for row in count.rows):
            if counts_profile(count, backend):
                columns[backend] = count
    rows = [row for b, count in columns.items() for row in count.rows if row.backend == b]
    missing = {b: why for b, why in newest.missing.items() if b not in columns}
    return TrafficRecord(newest.run, rows, missing), {b: count.run for b, count in columns.items()}


def whole_counts(found):
    """The Counts of traffic records that have every eager operator of the profile."""
    counts = map(TrafficRecord.from_json, (r for r in found if r["kind"] == "traffic"))
    return [count for count in counts if counts_profile(count, "reference")]


def column_of(implementation):
    """Its backend in a TrafficRecord."""
    return COLUMNS.get(implementation, implementation)


def counts_profile(count, implementation):
    """Whether a TrafficRecord has every operator of a step in an implementation's column."""
    return step_cost(count, implementation, shape_of(count.run), 1) is not None


def shape_of(run):
    """The Shape of a record's run."""
    s = run["shape"]
    return Shape(**{**s, "segments": tuple(s["segments"]), "dtype": getattr(torch, s["dtype"])})


def at_tokens(count, tokens):
    """The Shape that was counted, with so many tokens in all."""
    return replace(shape_of(count.run), B=1, segments=(tokens,))


def call_cost(count, op, direction, implementation, shape):
    """(bytes, launches) of one call at a Shape, or None where it was not counted.

    The counted passes scale with those that must move: SwiGLU's with F / D. What a launch loads
    again comes from a cache. An operator that the implementation lacks is the sum of those that it
    would replace.
    """
    case = next((c for c in CASES if c.op == op), None)
    if case is None:
        return None
    must_move = getattr(case, direction)
    if implementation == FLOOR:
        return must_move(shape) * shape.pass_bytes, 0
    column = column_of(implementation), direction
    rows = {row.op: row for row in count.rows if (row.backend, row.direction) == column}
    parts = [op] if op in rows else [c.op for c in CASES if c.part_of == op]
    if not parts or not rows.keys() >= set(parts):
        return None
    passes = sum(rows[part].memory for part in parts)
    scale = must_move(shape) / must_move(shape_of(count.run))
    return passes * scale * shape.pass_bytes, sum(rows[part].launches for part in parts)


def step_cost(count, implementation, shape, blocks, operators=OPERATORS):
    """(bytes, launches) of operators in an optimizer step of one micro-batch, or None."""
    moved, launches = 0, 0
    for case in operators:
        for direction, calls in zip(DIRECTIONS, calls_per_step(case, blocks), strict=True):
            cost = call_cost(count, case.op, direction, implementation, shape)
            if cost is None:
                return None
            moved, launches = moved + calls * cost[0], launches + calls * cost[1]
    return moved, launches


def seconds(cost, bytes_per_second, launch_seconds):
    """Of a (bytes, launches)."""
    moved, launches = cost
    return launches * launch_seconds + moved / bytes_per_second
