"""All that a fresh machine with a GPU should record, within the minutes given.

Correctness first, then the most important measurements first, each in a process of its own whose
records are on disk as soon as they exist. What there is no time for is told. On a CPU the same
steps run, at sizes that fit two cores.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import mvsplit_ops as mv
from bench.common import options as opt
from bench.common import records, text_tables
from bench.common.machine import describe_machine, describe_run
from bench.measure import implementations
from model.config import preset
from model.train.memory import plan
from mvsplit_ops import _backends

ROOT = Path(__file__).parent.parent.parent
MINUTES = {"cpu": 2.5, "cuda": 8.0}
REPORT_SECONDS = 20  # kept back for the last step
GRACE_SECONDS = 10  # from an interrupt to the end of a process
IN_LOOP = "dit400-mvsplit"
# Largest first; with weights in bfloat16 400 blocks fit an 80 GB GPU too.
IN_LOOP_SIZES = [(b, of) for of in ("bf16-autocast", "bf16") for b in (16, 8, 4)]
FREE_MEMORY = 0.85  # of a GPU's memory, what a step may be planned to take


@dataclass(frozen=True)
class Step:
    """What is run, and the share of all the time that it may take at most."""

    name: str
    command: tuple[str, ...]
    most: float


@dataclass(frozen=True)
class Outcome:
    """exit: the process's code; None: it ran out of its time, or there was none left for it."""

    step: str
    command: tuple[str, ...]
    seconds: float
    exit: int | None
    said: str


def steps_for(device, out, published=None):
    """The steps on a device, the most important first; records go into the folder `out`."""
    bench = (sys.executable, "-u", "-m", "bench")
    tests = [f"tests/ops/test_{op}.py" for op in _backends.OPS]
    pytest = (sys.executable, "-m", "pytest", "-n", "auto", "-q", "--maxfail=20")
    peers = ("--published", str(published)) if published else ()

    def measuring(command, *options):
        file = str(out / f"{command}.jsonl")
        return (*bench, command, *options, "--device", device, "--json", file)

    if torch.device(device).type == "cpu":
        return [
            Step("correct", (*pytest, "tests/ops/test_swiglu.py", "-k", "cpu and bf16"), 0.3),
            Step("machine", measuring("machine"), 0.2),
            Step("profile", measuring("profile", "--batch", "1", "--repeats", "10"), 0.5),
            Step("in the loop", measuring("profile", "--in-loop", "--blocks", "8"), 0.3),
            Step("ops", measuring("ops", "--batch", "1", "--op", "mvsplit_rmsnorm"), 0.3),
            Step("step", measuring("step", "--blocks", "4", "--backend", "eager", "cpu"), 0.3),
            Step("report", (*bench, "report", str(out)), 0.3),
        ]
    batch, precision = in_loop_size(device)
    size = ("--batch", str(batch), "--set", f"precision={precision}")
    loop = ("--preset", IN_LOOP, *size)
    whole = (IN_LOOP, *size, "--repeats", "3", "--checkpointing", "full", "selective")
    whole += ("--backend", "eager", "compile", "triton", "cuda")
    near, far = ("--batch", "26", "64"), ("--batch", "8", "128")
    return [
        Step("correct", (*pytest, *tests, "tests/cuda/test_gpu.py"), 0.3),
        Step("machine", measuring("machine"), 0.1),
        Step("profile B 26", measuring("profile", "--batch", "26"), 0.2),
        Step("profile B 64", measuring("profile", "--batch", "64"), 0.2),
        Step("in the loop", measuring("profile", "--in-loop", *loop, "--repeats", "3"), 0.25),
        Step("ops B 26, 64", measuring("ops", *near, *peers), 0.3),
        Step("step", measuring("step", *whole), 0.35),
        Step("ops B 8, 128", measuring("ops", *far, *peers), 0.3),
        Step("ops T 512", measuring("ops", *near, "--tokens", "256,256", *peers), 0.3),
        Step("ops D 2048", measuring("ops", *near, "--dim", "2048", *peers), 0.3),
        Step("report", (*bench, "report", str(out)), 0.2),
    ]


def in_loop_size(device):
    """The first (batch, precision) whose planned eager step fits the GPU; else the last."""
    memory = torch.cuda.get_device_properties(device).total_memory
    for batch, precision in IN_LOOP_SIZES:
        config = preset(IN_LOOP, batch=batch, micro_batch=0, probes=False, precision=precision)
        with mv.use_backend("reference"):  # it keeps the most for backward
            peak = plan(config).peak()
        if peak <= FREE_MEMORY * memory:
            break
    return batch, precision


def run(steps, out, seconds, progress=lambda what, of: None):
    """Run the steps in their order; yields an Outcome each. The last one has time kept back."""
    # A shell's background job ignores interrupts, and what it starts would too.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    for i, step in enumerate(steps):
        last = step is steps[-1]
        left = seconds - (time.monotonic() - start) - (0 if last else REPORT_SECONDS)
        progress(f"{step.name}, {max(0, left) / 60:.1f} min left", len(steps))
        if left <= 1:
            yield Outcome(step.name, step.command, 0.0, None, "no time was left for it")
        else:
            log = out / f"{i + 1:02d}-{step.name.replace(' ', '-').replace(',', '')}.log"
            yield _run(step, log, min(left, step.most * seconds))


def _run(step, log, seconds):
    start = time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    said = "" if code == 0 else _last_line(log)
    if code is None:
        said = f"stopped after {seconds:.0f} s; what it recorded is kept"
    return Outcome(step.name, step.command, time.monotonic() - start, code, said)


def _end(process):
    """Interrupt what still runs, so that it closes its files; then end it and its own processes."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log):
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def table(outcomes, out):
    cells = [
        (
            o.step,
            "not run or cut short" if o.exit is None else "done" if o.exit == 0 else "failed",
            f"{o.seconds:.0f}",
            o.said,
        )
        for o in outcomes
    ]
    columns = "step", "outcome", "seconds", "its last word"
    return text_tables.terminal(
        "Recorded", columns, cells, (f"records, logs and report.html: {out}",)
    )


def options(p):
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the records")
    p.add_argument(
        "--minutes",
        type=float,
        help=f"for everything (default: {MINUTES['cuda']:g}, on a CPU {MINUTES['cpu']:g})",
    )
    opt.add_device(p)
    implementations.add_published(p)


def command(args):
    published, device = implementations.published_checkout(args), opt.device(args)
    minutes = MINUTES[torch.device(device).type] if args.minutes is None else args.minutes
    if not minutes > 0:
        raise ValueError(f"--minutes: must be above 0, got {minutes:g}")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out: {args.out} is a file; give a folder")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    described = {**describe_run(), **describe_machine(device), "minutes": minutes}
    outcomes = []
    with opt.progress("device") as progress:
        steps = steps_for(device, out, published and published.resolve())
        for outcome in run(steps, out, 60 * minutes, progress):
            outcomes.append(outcome)
            record = {"kind": "device", "run": described, **asdict(outcome)}
            records.append(record, out / "device.jsonl")
    opt.console().print(table(outcomes, args.out))
    return 0 if all(o.exit in (0, None) for o in outcomes) else 1
