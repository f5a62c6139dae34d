"""Replay the guard over a run or a trace file, tell what it finds, and draw the picture."""

import json
from pathlib import Path

from model.config import UsageError
from model.stability.figures import mean_mode_screaming
from model.stability.guard import LOCKED, STATES, TRIP, WATCH
from model.stability.trace import load, replay

MEANING = {
    WATCH: "the gradient norm stands out",
    TRIP: "two kinds of evidence at once",
    LOCKED: "collapsed into the token mean",
}


def diagnose(path, picture=None, record=None):
    """Replay the guard over a run or a trace; returns its findings and the picture's path.

    picture, record   where the PNG and the findings as JSON go; record None: nowhere
    """
    for option, file in (("--out", picture), ("--json", record)):
        if file and file.exists():
            raise UsageError(f"{option}: {file} exists; choose another")
        if file and not file.parent.is_dir():
            raise UsageError(f"{option}: there is no folder {file.parent}; make it first")
    if picture and picture.suffix != ".png":
        raise UsageError(f"--out: a picture must be named .png, got {picture}")
    trace = load(path)
    guard = replay(trace)
    found = findings(trace, guard)
    picture = picture or default_picture(path)
    mean_mode_screaming(trace, guard, picture)
    if record:
        record.write_text(json.dumps(found, indent=1) + "\n")
    return found, picture


def default_picture(path):
    """Where the picture of a trace goes by default."""
    path = Path(path)
    if path.is_dir():
        return path / f"{path.resolve().name}-mms.png"
    return path.with_name(f"{path.stem}-mms.png")


def findings(trace, guard):
    """What a guard found in a trace, for JSON."""
    first = {s: {"step": n, "signals": why} for s, (n, why) in guard.first.items()}
    return {
        "trace": trace.title, "blocks": trace.depth, "lines": len(trace.rows),
        "steps": [trace.steps[0], trace.steps[-1]],
        "verdict": next((s for s in reversed(STATES) if s in guard.first), STATES[0]),
        "first": first, "lines_in_state": {s: guard.counts[s] for s in STATES[1:]},
        "lead": guard.lead(), "missing": guard.missing(), "notes": trace.notes,
    }  # fmt: skip


def report(found):
    """The findings as lines of text."""
    a, b = found["steps"]
    yield (
        f"{found['trace']}: {found['blocks']} blocks, {found['lines']} lines, steps {a} to {b}. "
        f"Verdict: {found['verdict']}"
    )
    for state in STATES[1:]:
        if state in found["first"]:
            at = found["first"][state]
            yield (
                f"  {state:6} first at step {at['step']} ({MEANING[state]}; "
                f"{found['lines_in_state'][state]} lines): {'; '.join(at['signals'])}"
            )
        else:
            yield f"  {state:6} never ({MEANING[state]})"
    if found["lead"] is not None:
        yield f"  LOCKED came {found['lead']} steps after the first warning"
    for title in ("missing", "notes"):
        for line in found[title]:
            yield f"  {title[:-1] if title == 'notes' else title}: {line}"
