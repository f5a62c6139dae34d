"""Files of records: appended to, read by date, and refused if a line is not a record."""

import json
import os

import pytest

from bench.common import records

RUN = {"date": "2026-01-02T03:04:05+00:00"}


def test_records_are_appended(tmp_path):
    path = tmp_path / "a.jsonl"
    for n in range(3):
        records.append({"kind": "ops", "run": RUN, "n": n}, path)
    assert [r["n"] for r in records.read(path)] == [0, 1, 2]


def test_a_record_after_a_truncated_line_starts_a_new_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"kind": "ops", "run"')
    records.append({"kind": "ops", "run": RUN}, path)
    first, second = path.read_text().splitlines()
    assert json.loads(second)["kind"] == "ops"
    with pytest.raises(ValueError, match="line 1: not a record"):
        records.read(path)


def test_nan_is_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(ValueError):
        records.append({"kind": "ops", "run": RUN, "seconds": float("nan")}, path)
    assert not path.exists()


def test_a_record_is_written_at_once(tmp_path, monkeypatch):
    """A process that is killed leaves whole lines."""
    written = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: written.append(data) or write(file, data))
    records.append({"kind": "ops", "run": RUN}, tmp_path / "a.jsonl")
    assert len(written) == 1 and written[0].endswith(b"\n")


def test_a_folder_is_read_by_date_and_kind(tmp_path):
    for name, kind, date in (
        ("b", "ops", "2026-02"),
        ("a", "step", "2026-03"),
        ("a", "ops", "2025"),
    ):
        records.append({"kind": kind, "run": {"date": date}}, tmp_path / f"{name}.jsonl")
    dates = [r["run"]["date"] for r in records.read_folder(tmp_path)]
    assert dates == ["2025", "2026-02", "2026-03"]
    assert [r["kind"] for r in records.read_folder(tmp_path, "ops")] == ["ops", "ops"]


def test_the_error_for_a_missing_file_lists_the_existing_ones(tmp_path):
    records.append({"run": RUN}, tmp_path / "there.jsonl")
    with pytest.raises(ValueError, match=r"no file .*gone.jsonl; .* has: there.jsonl"):
        records.read(tmp_path / "gone.jsonl")
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match=r"no folder .*gone; .* has: runs"):
        records.read_folder(tmp_path / "gone")


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"run": 1}', '{"rows": []}'])
def test_the_error_for_a_line_that_is_not_a_record_has_its_number(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"run": {{"date": "2026"}}}}\n{line}\n')
    with pytest.raises(ValueError, match="line 2: not a record of python -m bench"):
        records.read(path)
