"""Outcome of a training: whether it trained, stalled or collapsed, and what the guard detected."""

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.data import open_dataset
from model.demo import trivial_loss
from model.stability.guard import LOCK_LAST, LOCKED, TRIP, WATCH
from model.stability.trace import Trace, load_trace, replay_guard
from model.studies.base import Jobs, job_config
from model.train.runs import Job

LAST_STEPS = 10  # at the end of a run, over which loss and TCS are averaged
LEARNED = 0.75  # of the loss of predicting nothing: a run that ends above it has not learned
OUTCOMES = ("collapsed", "stalled", "trained")


@dataclass(frozen=True)
class Outcome:
    """A row of a study's results. The field names are keys of STUDY.json.

    outcome         trained: the last loss is below LEARNED x the loss of predicting nothing;
                    otherwise collapsed: TCS of the last block is above LOCK_LAST; or stalled
    watch, trip, locked   step of the guard's first detection, or None
    lead            steps from the first warning to LOCKED, or None
    greatest_tcs, least_centred, greatest_ratio   how near the run came to LOCKED: maximum of TCS,
                    minimum of G_ctr over its maximum so far, maximum of G_mean / G_ctr
    """

    blocks: int
    residual: str
    seed: int
    lr: float
    steps: int
    loss: float
    of_predicting_nothing: float
    outcome: str
    watch: int | None
    trip: int | None
    locked: int | None
    lead: int | None
    greatest_tcs: float | None
    least_centred: float
    greatest_ratio: float | None


def outcome_rows(jobs: Jobs, out: Path) -> list[dict[str, Any]]:
    """Return the outcomes of the trainings in out/<name>, for JSON."""
    return [
        {"run": name, **dataclasses.asdict(judge(job, out / name))} for name, job in jobs.items()
    ]


def judge(job: Job, folder: Path) -> Outcome:
    """Return the outcome of a training whose run is in a folder."""
    config = job_config(job)
    trace = load_trace(folder)
    guard = replay_guard(trace)
    losses = trace.series("loss")[1][-LAST_STEPS:]
    loss, trivial = sum(losses) / len(losses), trivial_loss(open_dataset(config))
    first = {state: detection.step for state, detection in guard.first.items()}
    tcs = trace.series("tcs", trace.layers("tcs")[-1])[1]
    collapsed = statistics.median(tcs[-LAST_STEPS:]) > LOCK_LAST
    least_centred, greatest_ratio = _writer_margins(trace)
    return Outcome(
        blocks=config.depth, residual=config.residual, seed=config.seed, lr=config.lr,
        steps=trace.steps[-1], loss=loss, of_predicting_nothing=loss / trivial,
        outcome="trained" if loss < LEARNED * trivial else "collapsed" if collapsed else "stalled",
        watch=first.get(WATCH), trip=first.get(TRIP), locked=first.get(LOCKED),
        lead=guard.lead_steps, greatest_tcs=max(tcs, default=None), least_centred=least_centred,
        greatest_ratio=greatest_ratio,
    )  # fmt: skip


def _writer_margins(trace: Trace) -> tuple[float, float | None]:
    """Return the minimum of G_ctr over its maximum so far, and the maximum of G_mean / G_ctr."""
    centred, mean = (
        dict(zip(*trace.series(f"writer_{part}"), strict=True)) for part in ("G_ctr", "G_mean")
    )
    greatest, shares = 0.0, [1.0]
    for value in centred.values():
        greatest = max(greatest, value)
        shares.append(value / greatest if greatest else 1.0)
    ratios = [mean[step] / value for step, value in centred.items() if value and step in mean]
    return min(shares), max(ratios, default=None)
