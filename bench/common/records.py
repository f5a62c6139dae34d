"""Records of measurements: JSON objects, one a line, in files that only grow.

Every record has "kind", what was measured, and "run", where and when (bench.machine). A line is
written whole or not at all, as soon as its measurement is there, so a run that is interrupted
leaves a file that can be read.
"""

import json
import os
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"


def append(record, path):
    """Add a record to a file; what the file holds stays."""
    line = json.dumps(record, allow_nan=False) + "\n"
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    file = os.open(path, flags, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # somebody's editor, or a full disk
            line = "\n" + line
        os.write(file, line.encode())
    finally:
        os.close(file)


def read(path):
    """The records of a file, oldest first. ValueError: no such file, or a line is no record."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}; there are: {_names(path.parent)}")
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
                '"run"); delete the line, or give another file'
            ) from None
        records.append(record)
    return records


def read_folder(folder=RESULTS, kind=None):
    """Every record of a folder's *.jsonl, by date; of one kind alone where it is given."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; there are: {_names(folder.parent, folders=True)}")
    found = [r for path in sorted(folder.glob("*.jsonl")) for r in read(path)]
    return sorted((r for r in found if kind in (None, r["kind"])), key=lambda r: r["run"]["date"])


def measurement_key(record):
    """Return a string that is equal for two records of the same measurement: the newer one counts."""
    run = [
        record["run"].get(name)
        for name in ("device", "threads", "shape", "backend", "blocks", "preset", "config")
    ]
    return json.dumps([run, *(record.get(name) for name in ("kind", "op", "matmul_dtype"))])


def _names(folder, folders=False):
    if not folder.is_dir():
        return f"no folder {folder} either"
    names = sorted(
        p.name for p in folder.iterdir() if (p.is_dir() if folders else p.suffix == ".jsonl")
    )
    return ", ".join(names) or "none"
