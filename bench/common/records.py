"""Records of measurements: JSON objects, one per line, in files that are only appended to.

Every record has "kind", the kind of measurement, and "run", a `Run`. A line is written whole or not
at all, as soon as its measurement is done: an interrupted run leaves a file that can be read.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

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


def append(record: Mapping[str, Any], path: Path) -> None:
    """Append a record to a file."""
    line = json.dumps(record, allow_nan=False) + "\n"
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    file = os.open(path, flags, 0o644)
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
        names = _names(folder.parent, folders=True)
        raise ValueError(f"no folder {folder}; {folder.parent} has: {names}")
    every = [r for path in sorted(folder.glob("*.jsonl")) for r in read(path)]
    return sorted((r for r in every if kind in (None, r["kind"])), key=lambda r: r["run"]["date"])


def measurement_key(record: Mapping[str, Any]) -> str:
    """Return a string that is equal for records of the same measurement: the newest counts."""
    run = [
        record["run"].get(name)
        for name in ("device", "threads", "shape", "backend", "blocks", "preset", "config")
    ]
    return json.dumps([run, *(record.get(name) for name in ("kind", "op", "matmul_dtype"))])


def _names(folder: Path, folders: bool = False) -> str:
    if not folder.is_dir():
        return "nothing, it does not exist"
    names = sorted(
        p.name for p in folder.iterdir() if (p.is_dir() if folders else p.suffix == ".jsonl")
    )
    return ", ".join(names) or "none"
