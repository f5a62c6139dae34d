"""Replay of the guard over a run or a trace file: findings, their text and the figure."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import UsageError
from model.stability.figures import draw_trace
from model.stability.guard import LOCKED, QUIET, STATES, TRIP, WATCH, Guard
from model.stability.trace import Trace, load_trace, replay_guard

MEANING = {
    WATCH: "the gradient norm is an outlier",
    TRIP: "two kinds of evidence in one step",
    LOCKED: "collapsed into the token mean",
}


@dataclass(frozen=True)
class Findings:
    """What a guard detected in a trace. The field names are keys of verdict.json.

    first           {state: {"step": first step, "signals": their descriptions}}
    lines_in_state  {state: number of lines}
    lead            steps from the first warning to LOCKED, or None
    missing, notes  sentences on signals that the trace lacks, and on irregularities of the file
    """

    trace: str
    blocks: int
    lines: int
    steps: tuple[int, int]
    verdict: str
    first: dict[str, dict[str, Any]]
    lines_in_state: dict[str, int]
    lead: int | None
    missing: list[str]
    notes: list[str]

    def to_json(self, **more: Any) -> str:
        return json.dumps({**dataclasses.asdict(self), **more}, indent=1) + "\n"


def diagnose(
    path: str | Path, picture: Path | None = None, record: Path | None = None
) -> tuple[Findings, Path]:
    """Replay the guard over a run or a trace; return the findings and the path of the figure.

    picture, record   where to write the PNG (default: default_picture(path)) and the findings as
                      JSON (default: nowhere); neither file may exist
    """
    for option, file in (("--out", picture), ("--json", record)):
        if file and file.exists():
            raise UsageError(f"{option}: {file} exists; choose another path")
        if file and not file.parent.is_dir():
            raise UsageError(f"{option}: the folder {file.parent} does not exist; create it first")
    if picture and picture.suffix != ".png":
        raise UsageError(f"--out: the picture must be named *.png, got {picture}")
    trace = load_trace(path)
    guard = replay_guard(trace)
    findings = collect_findings(trace, guard)
    picture = picture or default_picture(path)
    draw_trace(trace, guard, picture)
    if record:
        record.write_text(findings.to_json())
    return findings, picture


def default_picture(path: str | Path) -> Path:
    """Return the default path of a trace's figure."""
    path = Path(path)
    if path.is_dir():
        return path / f"{path.resolve().name}-mms.png"
    return path.with_name(f"{path.stem}-mms.png")


def collect_findings(trace: Trace, guard: Guard) -> Findings:
    """Return what a guard detected in a trace."""
    return Findings(
        trace=trace.title, blocks=trace.depth, lines=len(trace.rows),
        steps=(trace.steps[0], trace.steps[-1]),
        verdict=next((s for s in reversed(STATES) if s in guard.first), QUIET),
        first={state: detection._asdict() for state, detection in guard.first.items()},
        lines_in_state={s: guard.counts[s] for s in STATES[1:]},
        lead=guard.lead_steps, missing=guard.describe_missing(), notes=trace.notes,
    )  # fmt: skip


def describe(findings: Findings) -> list[str]:
    """Return the findings as lines of text."""
    first_step, last_step = findings.steps
    lines = [
        f"{findings.trace}: {findings.blocks} blocks, {findings.lines} lines, "
        f"steps {first_step} to {last_step}. Verdict: {findings.verdict}"
    ]
    for state in STATES[1:]:
        if state in findings.first:
            detection = findings.first[state]
            lines.append(
                f"  {state:6} first at step {detection['step']} ({MEANING[state]}; "
                f"{findings.lines_in_state[state]} lines): {'; '.join(detection['signals'])}"
            )
        else:
            lines.append(f"  {state:6} never ({MEANING[state]})")
    if findings.lead is not None:
        lines.append(f"  LOCKED followed {findings.lead} steps after the first warning")
    lines += [f"  missing: {sentence}" for sentence in findings.missing]
    lines += [f"  note: {sentence}" for sentence in findings.notes]
    return lines
