"""Response to the guard's states: save evidence, skip updates, stop a collapsed run.

    off    no guard                     stop   LOCKED ends the run
    warn   report states, do not act    skip   LOCKED ends the run, TRIP skips the update

A TRIP writes RUN/trip-STEP and LOCKED writes RUN/collapse-STEP. Both contain trace.json and
verdict.json, which names the last good checkpoint; the latter also contains trace.png. The last
good checkpoint is kept even when newer checkpoints exceed the configured number.
"""

from collections.abc import Callable, MutableSequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from model.config import GUARDS, Config, UsageError
from model.stability.figures import draw_trace
from model.stability.guard import LOCKED, QUIET, TRIP, Guard
from model.stability.replay import collect_findings
from model.stability.signals import MetricsRow
from model.stability.trace import as_json, load_trace, read_rows

Action: TypeAlias = Literal["go", "skip", "stop"]
GuardFunction: TypeAlias = Callable[[MetricsRow], Action]
History: TypeAlias = MutableSequence[MetricsRow]

MOST_SKIPS = 10  # consecutive updates to skip before the run is stopped


class Collapsed(RuntimeError):
    """The guard stopped a run; `folder` has the evidence."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


def supervise(
    guard: str | GuardFunction | None, config: Config, run: Path, history: History
) -> "Unguarded":
    """Return the supervisor of a run, for a mode of the guard or for a function that replaces it.

    history   the lines of the last steps, newest last (taps.Recorder.history)
    """
    if callable(guard):
        return FunctionGuard(guard)
    if guard in (None, "off"):
        return Unguarded()
    if not config.probes:
        raise UsageError(
            f"guard={guard} needs the measurements of the probes; pass probes=true or guard=off"
        )
    return Supervisor(Guard(config.depth), str(guard), run, history)


class Unguarded:
    """Supervisor that never intervenes, and the interface of the others.

    needs_metrics   whether each step's metrics must be passed in; otherwise None may be
    alert           whether every step must be written to metrics.jsonl
    may_save        whether the current state may become a checkpoint
    """

    needs_metrics = False

    @property
    def alert(self) -> bool:
        return False

    @property
    def may_save(self) -> bool:
        return True

    @property
    def last_good_checkpoint(self) -> Path | None:
        """The last checkpoint saved while nothing was detected, if it still exists."""
        return None

    def __call__(self, row: MetricsRow | None) -> Action:
        """Judge a step before its update; may add fields to the line of metrics."""
        return "go"

    def on_non_finite(self, row: MetricsRow | None) -> Action:
        """Judge a step whose loss or gradient norm is NaN or infinity."""
        return "stop"

    def end(self) -> None:
        """Raise the reason for "stop", if there is one."""

    def restore(
        self, checkpoint: Path, step: int, saved: dict[str, Any] | None, branch: bool
    ) -> None:
        """Resume from a checkpoint folder of this run or, for a branch, of another run.

        saved   the value of `on_save` for that checkpoint; None: it was saved without a guard
        """

    def on_save(self, step: int, name: str) -> dict[str, Any] | None:
        """Return the JSON state to store in the checkpoint `name` for `restore`, or None."""
        return None


class FunctionGuard(Unguarded):
    """Supervisor that calls a function with each line of metrics."""

    needs_metrics = True

    def __init__(self, function: GuardFunction) -> None:
        self._function = function

    def __call__(self, row: MetricsRow | None) -> Action:
        assert row is not None
        return self._function(row)


class Supervisor(Unguarded):
    """Supervisor that acts on the guard's states.

    It is on alert until the guard is quiet and the last TRIP is CALM steps ago. Every step is
    written then. Except in mode `warn`, no checkpoint is saved before the end, so the newest
    checkpoint is a good one.
    """

    needs_metrics = True

    def __init__(self, guard: Guard, mode: str, run: str | Path, history: History) -> None:
        if mode not in GUARDS:
            raise UsageError(f"guard must be one of {', '.join(GUARDS)}, got {mode!r}")
        self.guard, self.mode = guard, mode
        self._run, self._history = Path(run), history
        self._skipped, self._step = 0, 0
        self._collapsed: Collapsed | None = None
        self._good_name: str | None = None

    def __call__(self, row: MetricsRow | None) -> Action:
        assert row is not None
        self._step = row["step"]
        was_calm = self.guard.is_calm(self._step)
        state = row["guard"] = self.guard.observe(row)
        if state != QUIET:
            row["signals"] = self.guard.signals
        if state == TRIP and was_calm:
            self._write_evidence(f"trip-{self._step}")
        if state == LOCKED:
            return self._on_locked(row)
        if state == TRIP and self.mode == "skip":
            return self._skip(row)
        self._skipped = 0
        return "go"

    @property
    def alert(self) -> bool:
        return self.guard.state != QUIET or not self.guard.is_calm(self._step)

    @property
    def may_save(self) -> bool:
        return self.mode == "warn" or not self.alert

    @property
    def last_good_checkpoint(self) -> Path | None:
        path = self._run / "checkpoints" / self._good_name if self._good_name else None
        return path if path and path.is_dir() else None

    def on_non_finite(self, row: MetricsRow | None) -> Action:
        """Return "skip" in mode skip, up to MOST_SKIPS times in a row, and "stop" otherwise."""
        if self.mode != "skip" or self._skipped >= MOST_SKIPS:
            return "stop"
        assert row is not None
        return self._skip(row)

    def end(self) -> None:
        if self._collapsed:
            raise self._collapsed

    def restore(
        self, checkpoint: Path, step: int, saved: dict[str, Any] | None, branch: bool
    ) -> None:
        """Load the saved state, or observe the run's metrics again if there is none."""
        metrics = checkpoint.parent.parent / "metrics.jsonl"
        rows = [r for r in read_rows(metrics) if r["step"] <= step] if metrics.is_file() else []
        self._step = step
        if saved:
            self.guard.load(saved["guard"])
            self._skipped, self._good_name = saved["skipped"], saved["good"]
        else:
            for row in rows:
                self.guard.observe(row)
            self._good_name = None if self.alert else checkpoint.name
        if branch:
            self.guard.reset_detections()
            self._good_name = None
        else:
            self._history.extend(rows)

    def on_save(self, step: int, name: str) -> dict[str, Any]:
        self._step = step
        if not self.alert:
            self._good_name = name
        return {"guard": self.guard.dump(), "skipped": self._skipped, "good": self._good_name}

    def _skip(self, row: MetricsRow) -> Action:
        self._skipped += 1
        if self._skipped > MOST_SKIPS:
            return self._stop(row, f"TRIP persists after {MOST_SKIPS} consecutive skipped updates")
        row["skipped"] = True
        return "skip"

    def _on_locked(self, row: MetricsRow) -> Action:
        if self.mode == "warn":
            if self.guard.counts[LOCKED] == 1:
                self._write_evidence(f"collapse-{row['step']}", picture=True)
            return "go"
        return self._stop(row, f"LOCKED ({'; '.join(self.guard.signals)})")

    def _stop(self, row: MetricsRow, reason: str) -> Action:
        folder = self._write_evidence(f"collapse-{row['step']}", picture=True)
        checkpoint = self.last_good_checkpoint
        remedy = (
            "resume from the last good checkpoint with a lower lr, --resume "
            f"{checkpoint} --out NEW --set lr=..."
            if checkpoint
            else "no good checkpoint exists (--set save_every=N saves more often)"
        )
        self._collapsed = Collapsed(
            f"step {row['step']}: {reason}. {folder} has the trace; {remedy}, or start again with "
            "residual=mvsplit or residual=layerscale",
            folder,
        )
        return "stop"

    def _write_evidence(self, name: str, picture: bool = False) -> Path:
        """Write a folder with the trace, the findings and the name of the last good checkpoint."""
        folder = _unused(self._run / name)
        folder.mkdir(parents=True)
        (folder / "trace.json").write_text(as_json(self._history, self.guard.depth))
        trace, checkpoint = load_trace(folder / "trace.json"), self.last_good_checkpoint
        findings = collect_findings(trace, self.guard)
        name_in_run = str(checkpoint.relative_to(self._run)) if checkpoint else None
        (folder / "verdict.json").write_text(findings.to_json(last_good_checkpoint=name_in_run))
        if picture:
            draw_trace(trace, self.guard, folder / "trace.png")
        return folder


def _unused(folder: Path) -> Path:
    """Return the folder, or with a suffix -2, -3, ... where it exists."""
    names = (folder.name if i == 1 else f"{folder.name}-{i}" for i in range(1, 1000))
    return next(folder.with_name(n) for n in names if not folder.with_name(n).exists())
