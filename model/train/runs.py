"""Several trainings at a time, each in a process `python -m model train` of its own."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

from model.config import UsageError
from model.stability.signals import MetricsRow
from model.stability.trace import read_rows

PROCESSES = 2
POLL_SECONDS = 0.5
ROOT = Path(__file__).parent.parent.parent

Tables: TypeAlias = dict[str, list[MetricsRow]]  # the lines of metrics.jsonl by training


@dataclass(frozen=True)
class Job:
    """A training: a preset with some fields changed."""

    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)


def train_all(
    jobs: Mapping[str, Job], folder: str | Path, show: Callable[[Tables], None]
) -> Tables:
    """Train {name: Job} into folder/<name>, two at a time; return the lines of their metrics.

    Interrupted trainings are resumed. The guard only reports.

    show   called about twice a second with the lines so far
    """
    folder = Path(folder)
    waiting = list(jobs)
    running: dict[str, tuple[subprocess.Popen[str], IO[str]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < PROCESSES:
                name = waiting.pop(0)
                running[name] = _start(jobs[name], folder / name)
            for name, (process, log) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    _require_success(name, process, log)
            show(read_tables(jobs, folder))
            time.sleep(POLL_SECONDS)
    finally:
        for process, _ in running.values():
            process.terminate()
    tables = read_tables(jobs, folder)
    show(tables)
    return tables


def _start(job: Job, folder: Path) -> tuple[subprocess.Popen[str], IO[str]]:
    """Start a training; return its process and a file with its errors."""
    settings = [f"{name}={value}" for name, value in {"device": "cpu", **job.changes}.items()]
    command = [sys.executable, "-m", "model", "train", job.preset, "--out", str(folder.resolve())]
    log = tempfile.TemporaryFile("w+")  # a file: a pipe that nobody reads would fill up
    process = subprocess.Popen(
        [*command, "--quiet", "--guard", "warn", "--set", *settings],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log, text=True,
    )  # fmt: skip
    return process, log


def _require_success(name: str, process: subprocess.Popen[str], log: IO[str]) -> None:
    with log:
        if process.returncode:
            log.seek(0)
            last_line = log.read().strip().splitlines()[-1:]
            reason = " ".join(last_line) or f"exit code {process.returncode}"
            raise UsageError(f"training {name} failed: {reason}")


def read_tables(names: Iterable[str], folder: str | Path) -> Tables:
    """Return {name: lines of the metrics.jsonl in folder/<name>}."""
    tables = {}
    for name in names:
        path = Path(folder) / name / "metrics.jsonl"
        tables[name] = read_rows(path) if path.is_file() else []
    return tables
