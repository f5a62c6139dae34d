"""Base class of a study: its trainings by name, and the evaluation of their results."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from model import config as configuration
from model.config import CONTENDERS, Config
from model.stability.signals import MetricsRow
from model.train.runs import Job, train_all

Jobs: TypeAlias = dict[str, Job]
Results: TypeAlias = dict[str, Any]  # {"rows": [{column: value}], ...}, written as STUDY.json
Progress: TypeAlias = Callable[[int, int], None]  # called with the steps taken and their total


class Study:
    """blocks and seeds are the defaults of the trainings."""

    blocks: Sequence[int] = (100,)
    seeds = 1

    def jobs(self, blocks: Sequence[int], seeds: int) -> Jobs:
        """Return the trainings by name."""
        raise NotImplementedError

    def summarize(self, jobs: Jobs, out: Path) -> Results:
        """Return the results of the trainings in out/<name>."""
        raise NotImplementedError

    def conclusions(self, results: Results) -> Iterator[str]:
        """Yield the conclusions, one sentence each."""
        raise NotImplementedError

    def draw(self, results: Results, out: Path, path: Path) -> bool:
        """Write a figure as PNG; return whether the study has one."""
        return False

    def run(
        self,
        out: Path,
        blocks: Sequence[int] | None,
        seeds: int | None,
        steps: int | None,
        show: Progress,
    ) -> Results:
        """Start or resume the trainings, two at a time; return the results."""
        jobs = self.jobs(blocks or self.blocks, seeds or self.seeds)
        if steps:
            jobs = {n: Job(j.preset, {**j.changes, "steps": steps}) for n, j in jobs.items()}
        total = sum(job_config(job).steps for job in jobs.values())

        def show_steps(lines: dict[str, list[MetricsRow]]) -> None:
            show(sum(rows[-1]["step"] for rows in lines.values() if rows), total)

        train_all(jobs, out, show_steps)
        return self.summarize(jobs, out)


def job_config(job: Job) -> Config:
    return configuration.preset(job.preset, **job.changes)


def contender_jobs(blocks: Sequence[int], seeds: int) -> Jobs:
    """Return a training of Post-Norm, LayerScale and MV-Split for each depth and seed."""
    return {
        f"{residual}-{n}-seed{seed}": Job(f"collapse{n}", {**changes, "seed": seed})
        for n in blocks
        for seed in range(seeds)
        for residual, changes in CONTENDERS.items()
    }
