"""Records of a folder and their selection: the newest of each measurement, headlines, fastest."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from bench.cases import CASES, calls_per_step
from bench.common import records as record_files
from bench.common import text_tables
from bench.common.machine import MachineRecord
from bench.common.records import Run
from bench.measure.in_loop import InLoop
from bench.measure.profile import OperatorTiming, Profile
from bench.measure.sweep import Point
from bench.measure.train_step import Steps
from bench.static.kernel_resources import ResourceRecord
from bench.static.roofline import STEP_OPERATORS
from bench.static.traffic_record import PAPER_BLOCKS, TrafficRecord
from mvsplit_ops import _backends

CASES_BY_OP = {case.op: case for case in CASES}
KERNEL_BACKENDS = tuple(b for b in _backends.BACKENDS if b != "reference")

Data = TypeVar("Data")


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


def _parse_machine(json: dict[str, Any]) -> MachineRecord:
    for name in MachineRecord.__annotations__:
        json[name]
    return cast("MachineRecord", json)


# kind: (parser of a record, fields of "run" that its table and figures show)
PARSERS: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "profile": (
        Profile.from_json,
        ("device", "threads", "instruction_set", "shape", "backend", "blocks"),
    ),
    "ops": (Point.from_json, ("device", "shape", "repeats")),
    "in_loop": (InLoop.from_json, ("device", "threads", "preset", "config", "repeats")),
    "step": (Steps.from_json, ("device", "threads", "preset", "config", "repeats")),
    "traffic": (TrafficRecord.from_json, ("shape",)),
    "machine": (_parse_machine, ("device",)),
    "resources": (ResourceRecord.from_json, ("shape",)),
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
    return sorted(records, key=_date)


def parse_record(file: str, json: dict[str, Any]) -> SourcedRecord:
    """Return a record of a file; ValueError if a field is missing or an operator is unknown."""
    record = SourcedRecord(file, json, None)
    place = f"{file}: the {record.kind} record of {record.run['date']}"
    parse, run_fields = PARSERS.get(record.kind, (lambda _: None, ()))
    try:
        data = parse(json)
        for name in run_fields:
            json["run"][name]
    except (KeyError, TypeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
        raise ValueError(f"{place} {reason}; delete its line") from None
    for op in (row["op"] for row in (json, *json.get("rows", ())) if "op" in row):
        if op not in CASES_BY_OP:
            known = ", ".join(CASES_BY_OP)
            raise ValueError(
                f"{place} has the operator {op!r}, but bench/cases.py only {known}; delete its line"
            )
    return replace(record, data=data)


def newest(records: Iterable[SourcedRecord], kind: str) -> list[SourcedRecord]:
    """Return the newest record of each measurement of a kind, oldest first."""
    by_key = {record_files.measurement_key(r.json): r for r in records if r.kind == kind}
    return sorted(by_key.values(), key=_date)


def _date(record: SourcedRecord) -> str:
    return record.run["date"]


def newest_points(records: Iterable[SourcedRecord]) -> list[SourcedRecord[Point]]:
    """Return the newest record of each operator and shape, by operator, then by size."""
    ops = list(CASES_BY_OP)
    points = newest(records, "ops")
    return sorted(points, key=lambda r: (ops.index(r.data.op), count_tokens(r.run)))


def count_tokens(run: Run) -> int:
    """Return the tokens of all samples of a call."""
    return run["shape"]["B"] * sum(run["shape"]["segments"])


def group_sweeps(records: Iterable[SourcedRecord]) -> list[list[SourcedRecord[Point]]]:
    """Return the newest points in a group for each device and width."""
    groups: dict[tuple[str | None, str], list[SourcedRecord[Point]]] = {}
    for record in newest_points(records):
        key = record.device, text_tables.width_text(record.run["shape"])
        groups.setdefault(key, []).append(record)
    return list(groups.values())


def list_sources(records: Iterable[SourcedRecord]) -> tuple[str, ...]:
    """Return a line for each file and machine: file, dates, commit, device, software."""
    dates: dict[tuple[str, str], list[str]] = {}
    for record in records:
        dates.setdefault((record.file, _origin_text(record.run)), []).append(record.run["date"])
    return tuple(
        f"{file}, {' to '.join(dict.fromkeys((min(days), max(days))))}, {origin}"
        for (file, origin), days in dates.items()
    )


def _origin_text(run: Run) -> str:
    software = (f"{name} {run[name]}" for name in ("driver", "torch", "triton") if run.get(name))
    threads = f"threads {run['threads']}" if run.get("instruction_set") else None
    parts = f"commit {run['commit']}", run.get("device"), threads, *software
    return ", ".join(part for part in parts if part)


def list_failures(records: Sequence[SourcedRecord[Point]], with_missing: bool = True) -> list[str]:
    """Return lines: which implementations are wrong (or missing), the reason, and for which points.

    A line that holds for all the points does not name them.
    """
    records_by_line: dict[str, list[SourcedRecord[Point]]] = {}
    for record in records:
        reasons = dict(record.data.missing) if with_missing else {}
        reasons |= {name: f"failed: {reason}" for name, reason in record.data.failed.items()}
        for name, reason in reasons.items():
            records_by_line.setdefault(f"{name}: {reason}", []).append(record)
    return [
        line if len(group) == len(records) else f"{line} ({_point_names(group, records)})"
        for line, group in records_by_line.items()
    ]


def _point_names(
    records: Sequence[SourcedRecord[Point]], every: Sequence[SourcedRecord[Point]]
) -> str:
    """Return operator, size or both of some points: what differs among all of them."""
    several_ops = len({r.data.title for r in every}) > 1
    several_sizes = len({text_tables.size_text(r.run["shape"]) for r in every}) > 1
    names = [
        " at ".join(
            [r.data.title] * several_ops + [text_tables.size_text(r.run["shape"])] * several_sizes
        )
        for r in records
    ]
    return ", ".join(dict.fromkeys(names))


def named_profile(record: SourcedRecord[Profile]) -> Profile:
    """Return a profile whose "fused" column has the name of its backend."""
    profile = record.data
    names = {"fused": profile.run["backend"]}
    rows = [
        replace(row, seconds={names.get(n, n): pair for n, pair in row.seconds.items()})
        for row in profile.rows
    ]
    return replace(profile, rows=rows)


def largest_profile(
    sweep: Sequence[SourcedRecord[Point]],
) -> tuple[Profile, list[SourcedRecord[Point]]]:
    """Return the profile of a sweep at one size, and its records.

    The size is the one at which most operators were timed, the largest of several.
    """
    sizes: dict[str, list[SourcedRecord[Point]]] = {}
    for record in sweep:
        sizes.setdefault(text_tables.size_text(record.run["shape"]), []).append(record)
    largest = max(sizes.values(), key=lambda group: (len(group), count_tokens(group[0].run)))
    copy = max(record.data.copy_bytes_per_second for record in largest)
    rows = [_operator_timing(record.data) for record in largest]
    return Profile(largest[-1].run, copy, rows), largest


def _operator_timing(point: Point) -> OperatorTiming:
    case = CASES_BY_OP[point.op]
    return OperatorTiming(
        *(case.op, case.title, case.part_of, *calls_per_step(case, PAPER_BLOCKS)),
        seconds={name: column.seconds[:2] for name, column in point.columns.items()},
        bytes=point.must_move,
    )


@dataclass(frozen=True)
class Headline:
    """Figures for the operators of one step on a device, and their records."""

    device: str
    backend: str
    eager: float  # speed-up over eager PyTorch
    compile: float | None  # speed-up over torch.compile
    copy: float  # share of the copy bandwidth
    records: list[SourcedRecord]


def make_headlines(records: Sequence[SourcedRecord]) -> list[Headline]:
    """Return a headline for each profile, and for each sweep of a device without a profile."""
    profiles: list[tuple[Profile, list[Any]]]
    profiles = [(named_profile(r), [r]) for r in newest(records, "profile")]
    profiled = {profile.run["device"] for profile, _ in profiles}
    sweeps = [sweep for sweep in group_sweeps(records) if sweep[0].device not in profiled]
    profiles += map(largest_profile, sweeps)
    headlines = (_make_headline(*profile) for profile in profiles)
    return [headline for headline in headlines if headline]


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
    bytes_per_second = sum(row.bytes_per_step() for row in rows) / (ms[best] / 1e3)
    return Headline(
        device=profile.run["device"],
        backend=best,
        eager=ms["eager"] / ms[best],
        compile=ms["compile"] / ms[best] if "compile" in ms else None,
        copy=bytes_per_second / profile.copy_bytes_per_second,
        records=records,
    )


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
