"""Records of a folder and their selection: the newest of each measurement, headlines, fastest."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, Generic, TypeVar

from bench.cases import CASES_BY_OP, calls_per_step
from bench.common import records as record_files
from bench.common import text_tables
from bench.common.machine import MachineRecord
from bench.common.records import Record, Run
from bench.measure.in_loop import InLoop
from bench.measure.profile import OperatorTiming, Profile
from bench.measure.sweep import Point
from bench.measure.train_step import Steps
from bench.static.kernel_resources import ResourceRecord
from bench.static.roofline import STEP_OPERATORS
from bench.static.traffic_record import PAPER_BLOCKS, TrafficRecord
from mvsplit_ops import _backends

COMPARED = {"eager": "eager PyTorch", "compile": "torch.compile"}  # in a headline
KERNEL_BACKENDS = tuple(b for b in _backends.BACKENDS if b != "reference")

Data = TypeVar("Data")
Item = TypeVar("Item")
Key = TypeVar("Key")


@dataclass(frozen=True)
class SourcedRecord(Generic[Data]):
    """A record, and the name of its file."""

    file: str
    json: dict[str, Any]
    data: Data  # the parsed record; None for an unknown kind

    @property
    def kind(self) -> str:
        return self.json["kind"]

    @property
    def run(self) -> Run:
        return self.json["run"]

    @property
    def device(self) -> str | None:
        """Name of the processor; None if nothing was timed."""
        return self.run.get("device")


# kind: (class of its record, fields of "run" that its table and figures show)
RECORD_CLASSES: dict[str, tuple[type[Record], tuple[str, ...]]] = {
    "profile": (Profile, ("device", "threads", "instruction_set", "shape", "backend", "blocks")),
    "ops": (Point, ("device", "shape", "repeats")),
    "in_loop": (InLoop, ("device", "threads", "preset", "config", "repeats")),
    "step": (Steps, ("device", "threads", "preset", "config", "repeats")),
    "traffic": (TrafficRecord, ("shape",)),
    "machine": (MachineRecord, ("device",)),
    "resources": (ResourceRecord, ("shape",)),
}


def read_records(folder: Path | str) -> list[SourcedRecord]:
    """Return every record of a folder's *.jsonl, oldest first.

    The oldest records of steps, whose rows do not name an implementation, are left out.
    ValueError: the folder or a record does not exist, or a line cannot be read.
    """
    if not record_files.read_folder(folder):
        names = ", ".join(sorted(p.name for p in Path(folder).iterdir())) or "nothing"
        raise ValueError(
            f"no records in {folder}, which holds {names}; "
            f"run python -m bench profile --json {Path(folder) / 'profile.jsonl'} to make one"
        )
    records = [
        parse_record(path.name, json)
        for path in sorted(Path(folder).glob("*.jsonl"))
        for json in record_files.read(path)
        if json["kind"] != "step" or all("implementation" in row for row in json.get("rows", ()))
    ]
    return sorted(records, key=lambda r: r.run["date"])


def parse_record(file: str, json: dict[str, Any]) -> SourcedRecord:
    """Return a record of a file; ValueError if a field is missing or an operator is unknown."""
    place = f"{file}: the {json['kind']} record of {json['run']['date']}"
    record_class, run_fields = RECORD_CLASSES.get(json["kind"], (None, ()))
    try:
        data = record_class.from_json(json) if record_class else None
        for name in run_fields:
            json["run"][name]
    except (KeyError, TypeError) as error:
        absent = ", ".join(map(repr, error.args))
        reason = f"lacks {absent}" if isinstance(error, KeyError) else f"cannot be read ({error})"
        raise ValueError(f"{place} {reason}; delete its line") from None
    for op in (row["op"] for row in (json, *json.get("rows", ())) if "op" in row):
        if op not in CASES_BY_OP:
            known = ", ".join(CASES_BY_OP)
            raise ValueError(
                f"{place} has the operator {op!r}, but bench/cases.py only {known}; delete its line"
            )
    return SourcedRecord(file, json, data)


def newest(records: Iterable[SourcedRecord], kind: str) -> list[SourcedRecord]:
    """Return the newest record of each measurement of a kind, oldest first."""
    by_key = {record_files.measurement_key(r.json): r for r in records if r.kind == kind}
    return sorted(by_key.values(), key=lambda r: r.run["date"])


def newest_points(records: Iterable[SourcedRecord]) -> list[SourcedRecord[Point]]:
    """Return the newest record of each operator and shape, by operator, then by size."""
    ops = list(CASES_BY_OP)
    points = newest(records, "ops")
    return sorted(points, key=lambda r: (ops.index(r.data.op), count_tokens(r.run)))


def group_by(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return {key(item): items} in the order of the items."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def count_tokens(run: Run) -> int:
    """Return the tokens of all samples of a call."""
    return run["shape"]["B"] * sum(run["shape"]["segments"])


def group_sweeps(records: Iterable[SourcedRecord]) -> list[list[SourcedRecord[Point]]]:
    """Return the newest points in a group for each device and width."""
    points = newest_points(records)
    groups = group_by(points, lambda r: (r.device, text_tables.width_text(r.run["shape"])))
    return list(groups.values())


def list_sources(records: Iterable[SourcedRecord]) -> tuple[str, ...]:
    """Return a line for each file and machine: file, dates, commit, device, software."""
    lines = []
    for (file, origin), group in group_by(records, lambda r: (r.file, _origin_text(r.run))).items():
        dates = sorted(record.run["date"] for record in group)
        lines.append(f"{file}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {origin}")
    return tuple(lines)


def _origin_text(run: Run) -> str:
    software = (f"{name} {run[name]}" for name in ("driver", "torch", "triton") if run.get(name))
    threads = f"threads {run['threads']}" if run.get("instruction_set") else None
    parts = f"commit {run['commit']}", run.get("device"), threads, *software
    return ", ".join(part for part in parts if part)


def list_failures(records: Sequence[SourcedRecord[Point]], with_missing: bool = True) -> list[str]:
    """Return lines: which implementations are wrong (or missing), the reason, and for which points.

    A line that holds for all the points does not name them. Otherwise it names what differs among
    the points: operator, size or both.
    """
    names = [(r.data.title, text_tables.size_text(r.run["shape"])) for r in records]
    differs = [len(set(values)) > 1 for values in zip(*names, strict=True)]
    points_by_line: dict[str, list[str]] = {}
    for record, name in zip(records, names, strict=True):
        reasons = dict(record.data.missing) if with_missing else {}
        reasons |= {key: f"failed: {reason}" for key, reason in record.data.failed.items()}
        for implementation, reason in reasons.items():
            point = " at ".join(compress(name, differs))
            points_by_line.setdefault(f"{implementation}: {reason}", []).append(point)
    return [
        line if len(points) == len(records) else f"{line} ({', '.join(dict.fromkeys(points))})"
        for line, points in points_by_line.items()
    ]


def named_profile(record: SourcedRecord[Profile]) -> Profile:
    """Return a profile whose "fused" column has the name of its backend."""
    names = {"fused": record.run["backend"]}
    rows = [
        replace(row, seconds={names.get(n, n): pair for n, pair in row.seconds.items()})
        for row in record.data.rows
    ]
    return replace(record.data, rows=rows)


def largest_profile(
    sweep: Sequence[SourcedRecord[Point]],
) -> tuple[Profile, list[SourcedRecord[Point]]]:
    """Return the profile of a sweep at one size, and its records.

    The size is the one at which most operators were timed, the largest of several.
    """
    sizes = group_by(sweep, lambda record: text_tables.size_text(record.run["shape"]))
    largest = max(sizes.values(), key=lambda group: (len(group), count_tokens(group[0].run)))
    copy = max(record.data.copy_bytes_per_second for record in largest)
    rows = [_operator_timing(record.data) for record in largest]
    return Profile(largest[-1].run, copy, rows), largest


def _operator_timing(point: Point) -> OperatorTiming:
    case = CASES_BY_OP[point.op]
    calls = calls_per_step(case, PAPER_BLOCKS)
    seconds = {name: column.seconds[:2] for name, column in point.columns.items()}
    return OperatorTiming(case.op, case.title, case.part_of, *calls, seconds, point.must_move)


@dataclass(frozen=True)
class Headline:
    """Figures for the operators of one step on a device, and their records."""

    device: str
    backend: str
    speed_ups: dict[str, float]  # over eager PyTorch and, if it was timed, torch.compile
    copy_share: float  # of the copy bandwidth
    records: list[SourcedRecord]


def make_headlines(records: Sequence[SourcedRecord]) -> list[Headline]:
    """Return a headline for each profile, and for each sweep of a device without a profile."""
    profiles: list[tuple[Profile, list[SourcedRecord[Any]]]]
    profiles = [(named_profile(r), [r]) for r in newest(records, "profile")]
    profiled = {profile.run["device"] for profile, _ in profiles}
    profiles += [largest_profile(s) for s in group_sweeps(records) if s[0].device not in profiled]
    return [headline for profile in profiles if (headline := _make_headline(*profile))]


def _make_headline(profile: Profile, records: list[SourcedRecord]) -> Headline | None:
    """Return the headline of a profile; None if it lacks an operator, eager code or kernels."""
    ops = {case.op for case in STEP_OPERATORS}
    rows = [row for row in profile.rows if row.op in ops]
    names = set.intersection(*(set(row.seconds) for row in rows)) if rows else set()
    ms = {name: sum(row.ms_per_step(name) for row in rows) for name in names}
    kernels = [name for name in KERNEL_BACKENDS if name in ms]
    if len(rows) < len(ops) or not kernels or "eager" not in ms:
        return None
    best = min(kernels, key=lambda name: ms[name])
    speed_ups = {title: ms[n] / ms[best] for n, title in COMPARED.items() if n in ms}
    bytes_per_second = sum(row.bytes_per_step() for row in rows) / (ms[best] / 1e3)
    copy_share = bytes_per_second / profile.copy_bytes_per_second
    return Headline(profile.run["device"], best, speed_ups, copy_share, records)


Fastest = dict[tuple[tuple[int, int], str], tuple[str, str | None]]


def fastest(records: Iterable[SourcedRecord]) -> Fastest:
    """Return {(capability, op): (backend, file)} according to the ops records of CUDA devices.

    The backend with the least time for a step's forward and backward calls, at the largest shape
    at which both triton and cuda were tried; one whose result was wrong there does not count.
    """
    choices: Fastest = {}
    for record in newest_points(records):  # the largest shape of an operator comes last
        point, timing = record.data, _operator_timing(record.data)
        tried = {"triton", "cuda"} <= {*point.columns, *point.failed}
        timed = [name for name in ("triton", "cuda") if name in point.columns]
        if "capability" in record.run and point.op in _backends.OPS and tried and timed:
            major, minor = record.run["capability"]
            choices[(major, minor), point.op] = min(timed, key=timing.ms_per_step), record.file
    return choices


def disagreements(records: Iterable[SourcedRecord], committed: bool) -> list[str]:
    """Return a line for each entry of _backends.FASTEST that differs from the records.

    committed: these are all the committed records, so an entry without a record differs too.
    """
    expected: Fastest = dict.fromkeys(_backends.FASTEST, _backends.UNMEASURED) if committed else {}
    expected |= fastest(records)
    return [
        f"mvsplit_ops/_backends.py: FASTEST[{key}] is {_backends.FASTEST.get(key)}; "
        f"the records say {value}"
        for key, value in expected.items()
        if _backends.FASTEST.get(key) != value
    ]
