import json
import os

import pytest

from bench.common import records

RUN = {"date": "2026-01-02T03:04:05+00:00"}


def test_a_file_only_grows(tmp_path):
    path = tmp_path / "a.jsonl"
    for n in range(3):
        records.append({"kind": "ops", "run": RUN, "n": n}, path)
    assert [r["n"] for r in records.read(path)] == [0, 1, 2]


def test_a_line_that_was_cut_short_does_not_take_the_next_with_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"kind": "ops", "run"')
    records.append({"kind": "ops", "run": RUN}, path)
    first, second = path.read_text().splitlines()
    assert json.loads(second)["kind"] == "ops"
    with pytest.raises(ValueError, match="line 1: not a record"):
        records.read(path)


def test_what_is_not_finite_is_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(ValueError):
        records.append({"kind": "ops", "run": RUN, "seconds": float("nan")}, path)
    assert not path.exists()


def test_a_record_is_one_write(tmp_path, monkeypatch):
    """So that a process that is ended leaves whole lines."""
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
    assert [r["run"]["date"] for r in records.read_folder(tmp_path)] == [
        "2025",
        "2026-02",
        "2026-03",
    ]
    assert [r["kind"] for r in records.read_folder(tmp_path, "ops")] == ["ops", "ops"]


def test_what_is_missing_is_told_with_what_there_is(tmp_path):
    records.append({"run": RUN}, tmp_path / "there.jsonl")
    with pytest.raises(ValueError, match=r"no file .*gone.jsonl; there are: there.jsonl"):
        records.read(tmp_path / "gone.jsonl")
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match=r"no folder .*gone; there are: runs"):
        records.read_folder(tmp_path / "gone")


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"run": 1}', '{"rows": []}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"run": {{"date": "2026"}}}}\n{line}\n')
    with pytest.raises(ValueError, match="line 2: not a record of python -m bench"):
        records.read(path)
