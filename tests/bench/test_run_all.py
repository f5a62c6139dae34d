"""Everything that a new GPU machine records: existing commands, in order, in time."""

import json
import signal
import sys

import pytest

from bench.__main__ import main, make_parser
from bench.measure import run_all
from bench.measure.run_all import Step


def python(code, most=1.0, name="a step"):
    return Step(name, (sys.executable, "-u", "-c", code), most)


def outcomes(steps, tmp_path, seconds=60.0):
    return list(run_all.run(steps, tmp_path, seconds))


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_every_step_is_an_existing_command(device, tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "in_loop_size", lambda _: (8, "bf16"))
    steps = run_all.make_steps(device, tmp_path, tmp_path / "checkout")
    assert "pytest" in steps[0].command and "report" in steps[-1].command  # correctness is first
    for path in (part for part in steps[0].command if part.startswith("tests/")):
        assert (run_all.ROOT / path).is_file()
    ran = set()
    for step in steps[1:]:
        module, command, *rest = step.command[3:]
        args = make_parser().parse_args([command, *rest])
        assert module == "bench" and 0 < step.most <= 0.5
        if command != "report":
            assert args.device == device and args.json.parent == tmp_path
        ran.add((command, getattr(args, "in_loop", False)))
    commands = {"machine", "profile", "ops", "step", "report"}
    assert {command for command, _ in ran} == commands and ("profile", True) in ran


def test_the_largest_step_that_fits_is_chosen(monkeypatch):
    class Plan:
        def __init__(self, config):
            self.bytes = config.batch * (10 if config.precision == "bf16-autocast" else 5)

        def peak(self):
            return self.bytes

    class Properties:
        total_memory = 100

    monkeypatch.setattr(run_all, "plan", Plan)
    monkeypatch.setattr(run_all.torch.cuda, "get_device_properties", lambda d: Properties)
    assert run_all.in_loop_size("cuda") == (8, "bf16-autocast")
    Properties.total_memory = 25
    assert run_all.in_loop_size("cuda") == (4, "bf16")
    Properties.total_memory = 1
    assert run_all.in_loop_size("cuda") == (4, "bf16")


def test_a_failure_is_reported_and_the_next_step_runs(tmp_path):
    steps = [python("print('so far'); raise SystemExit('no such kernel')"), python("print(1)")]
    failed, done = outcomes(steps, tmp_path)
    assert failed.exit == 1 and failed.said == "no such kernel"
    assert done.exit == 0 and done.said == ""
    assert "so far" in (tmp_path / "01-a-step.log").read_text()


def test_a_step_that_takes_too_long_is_interrupted_and_its_records_are_saved(tmp_path):
    saved = tmp_path / "saved"
    code = (
        "import time\n"
        f"open({str(saved)!r}, 'w').write('begun')\n"
        "try:\n    time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    open({str(saved)!r}, 'a').write(', interrupted')\n"
    )
    stopped, after = outcomes([python(code, most=0.05), python("print(1)")], tmp_path)
    assert stopped.exit is None and "stopped after 3 s" in stopped.said
    assert saved.read_text() == "begun, interrupted" and after.exit == 0


def test_steps_can_be_interrupted_if_this_process_cannot(tmp_path):
    """A shell starts background processes with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        test_a_step_that_takes_too_long_is_interrupted_and_its_records_are_saved(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_step_that_ignores_the_interrupt_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "GRACE_SECONDS", 0.2)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    (stopped,) = outcomes([python(code, most=0.02)], tmp_path)
    assert stopped.exit is None and stopped.seconds < 30


def test_time_is_reserved_for_the_last_step(tmp_path):
    steps = [python("print(1)"), python("print(2)")]
    first, last = outcomes(steps, tmp_path, seconds=run_all.REPORT_SECONDS + 0.5)
    assert first.exit is None and first.said == "not started: no time left"
    assert last.exit == 0


def test_the_command_records_every_outcome(tmp_path, monkeypatch, capsys):
    steps = [python("print(1)", name="good"), python("raise SystemExit('bad luck')", name="bad")]
    monkeypatch.setattr(run_all, "make_steps", lambda *args: steps)
    out = tmp_path / "new" / "folder"
    assert main(["device", "--out", str(out), "--device", "cpu"]) == 1
    records = [json.loads(line) for line in (out / "device.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"], r["exit"]) for r in records] == [
        ("device", "good", 0), ("device", "bad", 1)
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert "done" in shown and "failed" in shown and "bad luck" in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--minutes", "0"], "--minutes: must be above 0"),
        (["--device", "cuda:9"], "cannot use 'cuda:9' here"),
    ],
    ids=["minutes", "device"],
)
def test_the_error_for_bad_input_is_one_line(args, message, tmp_path, capsys):
    assert main(["device", "--out", str(tmp_path / "out"), *args]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_file_as_output_folder_is_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert main(["device", "--out", str(file)]) == 2
    assert "must be a folder, but" in capsys.readouterr().err and file.read_text() == ""
