"""What a study is: trainings by name, and what is made of them."""

from model import config as configuration
from model.config import CONTENDERS
from model.train.runs import Job, train_all


class Study:
    """blocks, seeds: of its trainings, where nothing else is asked for."""

    blocks, seeds = (100,), 1

    def jobs(self, blocks, seeds):
        """{name: Job}."""
        raise NotImplementedError

    def summary(self, jobs, out):
        """What is made of trainings that stand in out/<name>: {"rows": [...], ...}, for JSON."""
        raise NotImplementedError

    def conclusions(self, results):
        """A sentence each."""
        raise NotImplementedError

    def draw(self, results, out, path):
        """A picture as PNG; returns whether there is one."""
        return False

    def run(self, out, blocks, seeds, steps, show):
        """Train, two at a time, or go on; then the summary."""
        jobs = self.jobs(blocks or self.blocks, seeds or self.seeds)
        if steps:
            jobs = {n: Job(j.preset, {**j.changes, "steps": steps}) for n, j in jobs.items()}
        total = sum(config_of(job).steps for job in jobs.values())

        def count(lines):
            show(sum(rows[-1]["step"] for rows in lines.values() if rows), total)

        train_all(jobs, out, count)
        return self.summary(jobs, out)


def config_of(job):
    return configuration.preset(job.preset, **job.changes)


def contenders(blocks, seeds):
    """Post-Norm, LayerScale and MV-Split at each depth, each seed."""
    return {
        f"{residual}-{n}-seed{seed}": Job(f"collapse{n}", {**changes, "seed": seed})
        for n in blocks
        for seed in range(seeds)
        for residual, changes in CONTENDERS.items()
    }
