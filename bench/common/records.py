"""Records of measurements: JSON objects, one per line, in files that are only appended to.

Every record has "kind", the kind of measurement, and "run", a `Run`. A line is written whole or not
at all, as soon as its measurement is done: an interrupted run leaves a file that can be read.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypedDict, TypeVar, get_args, get_origin, get_type_hints

ROOT = Path(__file__).parent.parent.parent  # of the checkout
RESULTS = ROOT / "bench" / "results"


class Run(TypedDict, total=False):
    """Date, software, machine and settings of a measurement; each kind has some of the fields."""

    date: str  # ISO 8601, UTC
    commit: str | None
    torch: str
    triton: str | None
    python: str
    shape: dict[str, Any]  # of a bench.cases.Shape
    device: str  # name of the processor
    threads: int
    instruction_set: str | None  # of the cpu backend
    capability: list[int]  # of a GPU, as are driver and clocks
    driver: str | None
    clocks: dict[str, str] | None  # MHz
    backend: str
    blocks: int
    repeats: int
    preset: str
    config: dict[str, Any]  # of a model.config.Config
    matmul_flops_per_second: float
    minutes: float
    cuda_compiler: str | None  # name and version


AnyRecord = TypeVar("AnyRecord", bound="Record")


@dataclass(frozen=True)
class Record:
    """A record; subclasses add its keys as fields: tuples, lists, dicts, dataclasses."""

    kind: ClassVar[str]
    run: Run

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_json(cls: type[AnyRecord], record: Mapping[str, Any]) -> AnyRecord:
        return _parse(cls, {name: value for name, value in record.items() if name != "kind"})


def _parse(expected: Any, value: Any) -> Any:
    """Return JSON data as the expected type; its numbers and strings are not checked.

    KeyError: a dataclass lacks fields, which are the arguments of the error.
    """
    if isinstance(expected, type) and is_dataclass(expected):
        hints = get_type_hints(expected)
        required = [f.name for f in fields(expected) if f.default is f.default_factory is MISSING]
        if absent := [name for name in required if name not in value]:
            raise KeyError(*absent)
        return expected(**{name: _parse(hints.get(name), v) for name, v in dict(value).items()})
    origin, args = get_origin(expected), get_args(expected)
    if origin is list:
        return [_parse(args[0], v) for v in value]
    if origin is dict:
        return {args[0](key): _parse(args[1], v) for key, v in value.items()}
    if origin is UnionType and value is not None:
        return _parse(args[0], value)
    return tuple(value) if origin is tuple else value


def append(record: Mapping[str, Any], path: Path | None) -> None:
    """Append a record to the file of --json, if there is one."""
    if path is None:
        return
    line = json.dumps(record, allow_nan=False) + "\n"
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # an editor, or a full disk
            line = "\n" + line
        os.write(file, line.encode())
    finally:
        os.close(file)


def read(path: Path | str) -> list[dict[str, Any]]:
    """Return the records of a file, oldest first.

    ValueError: there is no such file, or a line is not a record.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}; {path.parent} has: {_names(path.parent)}")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            record.setdefault("kind", "profile")  # the first records had no kind
            record["run"]["date"]
        except (ValueError, AttributeError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number}: not a record of python -m bench (a JSON object with "
                '"run"); delete the line, or pass another file'
            ) from None
        records.append(record)
    return records


def read_folder(folder: Path | str = RESULTS, kind: str | None = None) -> list[dict[str, Any]]:
    """Return every record of a folder's *.jsonl by date, or only those of one kind."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; {folder.parent} has: {_names(folder.parent)}")
    every = [r for path in sorted(folder.glob("*.jsonl")) for r in read(path)]
    return sorted((r for r in every if kind in (None, r["kind"])), key=lambda r: r["run"]["date"])


def measurement_key(record: Mapping[str, Any]) -> str:
    """Return a string that is equal for records of the same measurement: the newest counts."""
    run = [
        record["run"].get(name)
        for name in ("device", "threads", "shape", "backend", "blocks", "preset", "config")
    ]
    return json.dumps([run, *(record.get(name) for name in ("kind", "op", "matmul_dtype"))])


def _names(folder: Path) -> str:
    """Return the names of a folder's records and folders."""
    names = sorted(p.name for p in folder.glob("*") if p.is_dir() or p.suffix == ".jsonl")
    return ", ".join(names) or "neither folders nor records"
