"""The operator profile: its measurement, its table, its command."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from bench import __main__ as cli
from bench.cases import PROFILE, Shape
from bench.common import records
from bench.common.accuracy import Inaccurate
from bench.common.machine import measure_copy
from bench.common.records import ROOT
from bench.common.text_tables import Table
from bench.common.timing import Timer, time_interleaved
from bench.measure import profile
from bench.measure.profile import OperatorTiming, Profile
from bench.static import cuda_emulator

TINY = Shape(B=2, segments=(9, 4), D=64, H=4, F=24)


def row(**changes):
    seconds = {"eager": (4e-3, 8e-3), "compile": (2e-3, 4e-3), "fused": (1e-3, 2e-3)}
    timing = OperatorTiming("swiglu", "SwiGLU", None, 700, 400, seconds, (2e6, 5e6))
    return dataclasses.replace(timing, **changes)


def a_profile(rows):
    run = {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc",
        "device": "A CPU",
        "threads": 2,
        "instruction_set": "AVX2",
        "torch": "2.13",
        "python": "3.11",
        "backend": "cpu",
        "blocks": 400,
        "repeats": 3,
        "shape": {"B": 4, "segments": [256, 64], "D": 8, "H": 1, "F": 24, "dtype": "bfloat16"},
    }
    return Profile(run, 1e10, rows)


def test_the_time_of_a_step_is_calls_times_seconds():
    assert row().ms_per_step("eager") == pytest.approx(700 * 4 + 400 * 8)
    assert row().ms_per_step("fused") == pytest.approx(700 * 1 + 400 * 2)
    moved = 700 * 2e6 + 400 * 5e6
    assert row().bytes_per_second("fused") == pytest.approx(moved / 1.5)


def test_the_total_leaves_out_replaced_operators():
    rows = [row(part_of="fused"), row(part_of="fused"), row(op="fused"), row(op="other")]
    assert len(a_profile(rows).total_rows) == 2
    *_, total = profile.format_cells(a_profile(rows))
    assert total[0] == "total, this machine" and total[4:7] == ("12000", "6000", "3000")
    assert total[7:9] == ("4.00x", "2.00x")


def test_records_are_equal_after_a_round_trip(tmp_path):
    file = tmp_path / "runs.jsonl"
    first = a_profile([row()])
    records.append(first.to_json(), file)
    records.append(a_profile([row(op="b")]).to_json(), file)
    read = [Profile.from_json(record) for record in records.read(file)]
    assert read[0] == first and read[1].rows[0].op == "b"


def test_measure_times_every_operator():
    steps = []
    result = profile.measure(TINY, blocks=8, repeats=2, progress=lambda *s: steps.append(s))
    assert [r.op for r in result.rows] == [case.op for case in PROFILE]
    assert all(s > 0 for r in result.rows for pair in r.seconds.values() for s in pair)
    assert result.rows[0].forward_calls == 14 and result.rows[0].backward_calls == 8
    assert len(steps) == steps[0][1]
    assert json.loads(json.dumps(result.to_json()))["run"]["shape"]["segments"] == [9, 4]


def test_a_wrong_operator_is_not_timed(monkeypatch):
    right = PROFILE[0].fused()

    def fused(case, backend):
        return lambda *inputs: tuple(1.1 * t for t in right(*inputs))

    monkeypatch.setattr(type(PROFILE[0]), "fused", fused)
    monkeypatch.setattr(profile, "time_interleaved", lambda *args: pytest.fail("timed"))
    with pytest.raises(Inaccurate, match="rope, fused, result 0"):
        profile.measure(TINY, repeats=1)


def test_implementations_take_turns_and_medians_are_returned():
    order, clock = [], iter(range(1000))

    def timer(f):
        return next(clock), f()

    calls = {
        name: (lambda n=name: order.append(n) or n, lambda got, n=name: order.append((n, got)))
        for name in "ab"
    }
    medians = time_interleaved(calls, 5, timer)
    assert order == ["a", ("a", "a"), "b", ("b", "b")] * 6  # one of them to warm up
    assert medians["a"] == (12, 13, 25)


def test_times_and_bandwidth_are_positive():
    seconds, result = Timer("cpu")(lambda: 7)
    assert seconds > 0 and result == 7
    assert measure_copy("cpu", megabytes=4, repeats=3) > 1e6


def test_the_command_prints_and_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile, "measure", lambda shape, *rest: a_profile([row()]))
    out = tmp_path / "p.jsonl"
    assert cli.main(["profile", "--json", str(out), "--tokens", "8,2", "--dtype", "fp32"]) == 0
    shown = capsys.readouterr().out
    assert "SwiGLU" in shown and "1697.4 ms" in shown and "614.0 ms" in shown
    assert "not this machine" in shown and len(out.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--json", "no/such/folder/x.jsonl"], "make it first"),
        (["--device", "cuda:99"], "--device: cannot use 'cuda:99' here"),
        (["--device", "gpu"], "--device: must be cpu, cuda or cuda:N, got 'gpu'"),
        (["--backend", "cuda", "--batch", "1", "--tokens", "2"], "backend 'cuda' cannot run here"),
        (["--backend", "triton", "--device", "cpu"], "triton only emulates its kernels on a CPU"),
    ],
    ids=["json", "no such device", "device", "backend", "interpreted"],
)
def test_an_error_is_one_line_and_exit_code_2(args, message, capsys):
    with cuda_emulator.using(None):
        assert cli.main(["profile", *args]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("python -m bench profile: ") and message in error


@pytest.mark.parametrize(
    "args", [["--tokens", "0"], ["--tokens", "a"], ["--batch", "-1"], ["--dtype", "int8"]]
)
def test_bad_options_are_refused(args, capsys):
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["profile", *args])
    assert exit_code.value.code == 2 and args[0] in capsys.readouterr().err


def test_help_names_the_options():
    command = [sys.executable, "-m", "bench", "profile", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for option in ("--blocks", "--batch", "--tokens", "--dtype", "--device", "--json"):
        assert option in text


def test_torch_threads_are_an_option(monkeypatch, threads):
    threads_used = []
    monkeypatch.setattr(
        profile, "measure", lambda *a: threads_used.append(torch.get_num_threads()) or a_profile([])
    )
    monkeypatch.setattr(profile, "make_table", lambda result: Table("Empty", ["operator"], []))
    assert cli.main(["profile", "--threads", "1"]) == 0
    assert threads_used == [1]
    threads(2)
