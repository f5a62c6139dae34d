"""Several trainings at a time, each a `python -m model train` of its own that another can read."""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from model.config import UsageError
from model.stability.trace import read_rows

PROCESSES = 2
ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Job:
    """A training: a preset with fields changed."""

    preset: str
    changes: dict = field(default_factory=dict)


def train_all(jobs, folder, show):
    """Train {name: Job} into folder/<name>, two at a time; returns {name: lines of its metrics}.

    Each goes on where it stood; the guard looks on and lets it run.

    show   called about twice a second with {name: lines so far}
    """
    folder = Path(folder)
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < PROCESSES:
                name = waiting.pop(0)
                running[name] = _start(jobs[name], folder / name)
            for name, (process, log) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    _require_success(name, process, log)
            show(lines(jobs, folder))
            time.sleep(0.5)
    finally:
        for process, _ in running.values():
            process.terminate()
    show(lines(jobs, folder))
    return lines(jobs, folder)


def _start(job, folder):
    settings = [f"{name}={value}" for name, value in {"device": "cpu", **job.changes}.items()]
    command = [sys.executable, "-m", "model", "train", job.preset, "--out", str(folder.resolve())]
    log = tempfile.TemporaryFile("w+")  # a pipe that nobody reads fills up
    process = subprocess.Popen(
        [*command, "--quiet", "--guard", "warn", "--set", *settings],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log, text=True,
    )  # fmt: skip
    return process, log


def _require_success(name, process, log):
    with log:
        if process.returncode:
            log.seek(0)
            said = log.read().strip().splitlines()[-1:]
            raise UsageError(f"training {name} failed: {' '.join(said) or process.returncode}")


def lines(names, folder):
    """{name: the lines of its metrics.jsonl}."""
    table = {}
    for name in names:
        path = Path(folder) / name / "metrics.jsonl"
        table[name] = read_rows(path) if path.is_file() else []
    return table
