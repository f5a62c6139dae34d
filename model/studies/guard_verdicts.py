"""Study of the collapse guard: how often, and how early, its states predict a run's outcome."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from model.studies.base import Jobs, Results, Study, contender_jobs
from model.studies.outcomes import OUTCOMES, outcome_rows


class GuardVerdicts(Study):
    """Trainings of three residuals, and the guard's states per outcome."""

    blocks, seeds = (100, 400), 3

    def jobs(self, blocks: Sequence[int], seeds: int) -> Jobs:
        return contender_jobs(blocks, seeds)

    def summarize(self, jobs: Jobs, out: Path) -> Results:
        rows, counts = outcome_rows(jobs, out), {}
        for outcome in OUTCOMES:
            runs = [row for row in rows if row["outcome"] == outcome]
            counts[outcome] = {"runs": len(runs)}
            for state in ("watch", "trip", "locked", "lead"):
                counts[outcome][state] = sum(row[state] is not None for row in runs)
        return {"rows": rows, "counts": counts}

    def conclusions(self, results: Results) -> Iterator[str]:
        for outcome, n in results["counts"].items():
            yield (
                f"{n['runs']} {outcome}: LOCKED in {n['locked']} ({n['lead']} with an earlier "
                f"warning), TRIP in {n['trip']}, WATCH in {n['watch']}"
            )
