"""Every measurement that a new GPU machine should record, within a given number of minutes.

The tests come first, then the measurements in order of importance, each in a process of its own
whose records are on disk as soon as they exist. A step that does not fit into the time is reported.
On a CPU the same steps run, at sizes for two cores.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.cases import is_cuda
from bench.common import options as opt
from bench.common import records
from bench.common.machine import describe_machine, describe_run
from bench.common.records import ROOT
from bench.common.text_tables import Table
from bench.measure import implementations, workload
from model.config import preset
from model.train.memory import plan
from mvsplit_ops import _backends

MINUTES = {"cpu": 2.5, "cuda": 8.0}
REPORT_SECONDS = 20  # reserved for the last step
GRACE_SECONDS = 10  # from an interrupt to the end of a process
IN_LOOP_PRESET = "dit400-mvsplit"
# Largest first; with weights in bfloat16 400 blocks fit an 80 GB GPU too.
IN_LOOP_SIZES = [(b, precision) for precision in ("bf16-autocast", "bf16") for b in (16, 8, 4)]
MEMORY_SHARE = 0.85  # of a GPU's memory that a step may be planned to take


@dataclass(frozen=True)
class Step:
    """A command, and the largest share of the total time that it may take."""

    name: str
    command: tuple[str, ...]
    most: float


@dataclass(frozen=True)
class Outcome:
    """The result of a step. exit: its exit code; None: it ran out of time or was not started."""

    step: str
    command: tuple[str, ...]
    seconds: float
    exit: int | None
    said: str  # the last line of a failed command


def make_steps(device: str, out: Path, published: Path | None = None) -> list[Step]:
    """Return the steps on a device, the most important first; records go into the folder `out`."""
    bench = (sys.executable, "-u", "-m", "bench")
    tests = [f"tests/ops/test_{op}.py" for op in _backends.OPS]
    pytest = (sys.executable, "-m", "pytest", "-n", "auto", "-q", "--maxfail=20")
    peers = ("--published", str(published)) if published else ()

    def measure(command: str, *options: str) -> tuple[str, ...]:
        file = str(out / f"{command}.jsonl")
        return (*bench, command, *options, "--device", device, "--json", file)

    if not is_cuda(device):
        small = ("--blocks", "4", "--implementation", "eager", "cpu")
        return [
            Step("correct", (*pytest, "tests/ops/test_swiglu.py", "-k", "cpu and bf16"), 0.3),
            Step("machine", measure("machine"), 0.2),
            Step("profile", measure("profile", "--batch", "1", "--repeats", "10"), 0.5),
            Step("in the loop", measure("profile", "--in-loop", "--blocks", "8"), 0.3),
            Step("ops", measure("ops", "--batch", "1", "--op", "mvsplit_rmsnorm"), 0.3),
            Step("step", measure("step", *small), 0.3),
            Step("report", (*bench, "report", str(out)), 0.3),
        ]
    batch, precision = in_loop_size(device)
    size = ("--batch", str(batch), "--set", f"precision={precision}", "--repeats", "3")
    loop = ("--preset", IN_LOOP_PRESET, *size)
    variants = ("--checkpointing", "full", "selective", "--implementation", "eager", "compile")
    near, far = ("--batch", "26", "64"), ("--batch", "8", "128")
    return [
        Step("correct", (*pytest, *tests, "tests/cuda/test_gpu.py"), 0.3),
        Step("machine", measure("machine"), 0.1),
        Step("profile B 26", measure("profile", "--batch", "26"), 0.2),
        Step("profile B 64", measure("profile", "--batch", "64"), 0.2),
        Step("in the loop", measure("profile", "--in-loop", *loop), 0.25),
        Step("ops B 26, 64", measure("ops", *near, *peers), 0.3),
        Step("step", measure("step", *loop[1:], *variants, "triton", "cuda"), 0.35),
        Step("ops B 8, 128", measure("ops", *far, *peers), 0.3),
        Step("ops T 512", measure("ops", *near, "--tokens", "256,256", *peers), 0.3),
        Step("ops D 2048", measure("ops", *near, "--dim", "2048", *peers), 0.3),
        Step("report", (*bench, "report", str(out)), 0.2),
    ]


def in_loop_size(device: str) -> tuple[int, str]:
    """Return the first (batch, precision) whose planned eager step fits the GPU, else the last."""
    memory = torch.cuda.get_device_properties(device).total_memory
    for batch, precision in IN_LOOP_SIZES:
        changes = {"batch": batch, "micro_batch": 0, "probes": False, "precision": precision}
        with workload.use_implementation(workload.EAGER):  # it saves the most for backward
            peak = plan(preset(IN_LOOP_PRESET, **changes)).peak()
        if peak <= MEMORY_SHARE * memory:
            break
    return batch, precision


def run(
    steps: Sequence[Step], out: Path, seconds: float, progress: opt.ReportProgress = opt.no_progress
) -> Iterator[Outcome]:
    """Run the steps in order; yield an Outcome for each. Time is reserved for the last one."""
    # A shell's background job ignores interrupts, and so would the processes that it starts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    for i, step in enumerate(steps):
        last = step is steps[-1]
        left = seconds - (time.monotonic() - start) - (0 if last else REPORT_SECONDS)
        progress(f"{step.name}, {max(0, left) / 60:.1f} min left", len(steps))
        if left <= 1:
            yield Outcome(step.name, step.command, 0.0, None, "not started: no time left")
        else:
            log = out / f"{i + 1:02d}-{step.name.replace(' ', '-').replace(',', '')}.log"
            yield _run_step(step, log, min(left, step.most * seconds))


def _run_step(step: Step, log: Path, seconds: float) -> Outcome:
    start = time.monotonic()
    code = None
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            _stop(process)
    message = "" if code == 0 else _last_line(log)
    if code is None:
        message = f"stopped after {seconds:.0f} s; its records so far are saved"
    return Outcome(step.name, step.command, time.monotonic() - start, code, message)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a running process, so that it closes its files; then end it and its children."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


def make_table(outcomes: Sequence[Outcome], out: Path) -> Table:
    results = {None: "not run or cut short", 0: "done"}
    cells = [(o.step, results.get(o.exit, "failed"), f"{o.seconds:.0f}", o.said) for o in outcomes]
    columns = "step", "outcome", "seconds", "last line of output"
    return Table("Recorded", columns, cells, [f"records, logs and report.html: {out}"])


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for records, logs, report"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"for all steps together (default: {MINUTES['cuda']:g}, on a CPU {MINUTES['cpu']:g})",
    )
    opt.add_device(parser)
    implementations.add_published(parser)


def run_command(args: argparse.Namespace) -> int:
    published, device = implementations.chosen_checkout(args), opt.select_device(args)
    minutes = MINUTES[torch.device(device).type] if args.minutes is None else args.minutes
    if not minutes > 0:
        raise ValueError(f"--minutes: must be above 0, got {minutes:g}")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out: must be a folder, but {args.out} is a file")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    described = describe_run() | describe_machine(device)
    described["minutes"] = minutes
    outcomes = []
    with opt.show_progress("device") as progress:
        steps = make_steps(device, out, published and published.resolve())
        for outcome in run(steps, out, 60 * minutes, progress):
            outcomes.append(outcome)
            record = {"kind": "device", "run": described, **asdict(outcome)}
            records.append(record, out / "device.jsonl")
    opt.make_console().print(make_table(outcomes, args.out).to_terminal())
    return 0 if all(o.exit in (0, None) for o in outcomes) else 1
