"""What is done with what the guard finds: evidence kept, updates skipped, a locked run stopped.

    off    no guard                   stop   LOCKED ends the run
    warn   it says what it sees       skip   LOCKED ends the run, TRIP skips the update

A TRIP leaves RUN/trip-STEP, LOCKED RUN/collapse-STEP: trace.json, verdict.json which names the last
good checkpoint, and of a collapse trace.png. Newer checkpoints do not push out the last good one.
"""

import json
from pathlib import Path

from model.config import GUARDS, UsageError
from model.stability.figures import mean_mode_screaming
from model.stability.guard import LOCKED, QUIET, TRIP, Guard
from model.stability.replay import findings
from model.stability.trace import as_json, load, read_rows

SKIPS = 10  # updates skipped one after another before skipping is given up


class Collapsed(RuntimeError):
    """The guard stopped a run; `folder` has the evidence."""

    def __init__(self, message, folder):
        super().__init__(message)
        self.folder = folder


def supervise(guard, config, run, history):
    """The supervisor of a run: of the guard's mode, or of a function in its place.

    history   the lines of the last steps, newest last (taps.Recorder.history)
    """
    if callable(guard):
        return _Function(guard)
    if guard in (None, "off"):
        return Unguarded()
    if not config.probes:
        raise UsageError(f"guard={guard} needs what probes measure; pass probes=true, or guard=off")
    return Supervisor(Guard(config.depth), guard, run, history)


class Unguarded:
    """Lets every step pass.

    reads      is it called with metrics
    alert      is every step of interest
    may_save   is the state worth a checkpoint
    """

    reads, alert, may_save = False, False, True

    def __call__(self, row):
        return "go"

    def not_finite(self, row):
        return "stop"

    def end(self):
        """Called after stop."""

    def restore(self, checkpoint, step, saved, branch):
        """Resume from a checkpoint folder, of this run or, for a branch, of another.

        saved   what `saving` returned for that checkpoint; None: it was saved without a guard
        """

    def saving(self, step, name):
        """Return the JSON state that the checkpoint `name` stores for `restore`; None: nothing."""
        return None

    @property
    def good(self):
        """The last checkpoint that was saved while nothing was found; None where none was."""
        return None


class _Function(Unguarded):
    reads = True

    def __init__(self, function):
        self._function = function

    def __call__(self, row):
        return self._function(row)


class Supervisor(Unguarded):
    """Acts on what the guard finds. While a TRIP is near it is on the alert: every step is written
    then, and but for `warn` no checkpoint is before the end, so that the newest is a good one.
    """

    reads = True

    def __init__(self, guard, mode, run, history):
        if mode not in GUARDS:
            raise UsageError(f"guard must be one of {', '.join(GUARDS)}, got {mode!r}")
        self.guard, self.mode = guard, mode
        self._run, self._history = Path(run), history
        self._skipped, self._end, self._step, self._good = 0, None, 0, None

    def __call__(self, row):
        self._step = row["step"]
        calm = self.guard.calm(self._step)
        state = row["guard"] = self.guard.observe(row)
        if state != QUIET:
            row["signals"] = self.guard.signals
        if state == TRIP and calm:
            self._keep(f"trip-{self._step}")
        if state == LOCKED:
            return self._locked(row)
        if state == TRIP and self.mode == "skip":
            return self._skip(row)
        self._skipped = 0
        return "go"

    @property
    def alert(self):
        return self.guard.state != QUIET or not self.guard.calm(self._step)

    @property
    def may_save(self):
        return self.mode == "warn" or not self.alert

    def not_finite(self, row):
        """skip in that mode, while it may help."""
        return self._skip(row) if self.mode == "skip" and self._skipped < SKIPS else "stop"

    def end(self):
        raise self._end

    def restore(self, checkpoint, step, saved, branch):
        """Load the saved state, or observe the run's metrics again where there is none."""
        lines = checkpoint.parent.parent / "metrics.jsonl"
        rows = [r for r in read_rows(lines) if r["step"] <= step] if lines.is_file() else []
        self._step = step
        if saved:
            self.guard.load(saved["guard"])
            self._skipped, self._good = saved["skipped"], saved["good"]
        else:
            for row in rows:
                self.guard.observe(row)
            self._good = None if self.alert else checkpoint.name
        if branch:
            self.guard.begin_anew()
            self._good = None
        else:
            self._history.extend(rows)

    def saving(self, step, name):
        self._step = step
        if not self.alert:
            self._good = name
        return {"guard": self.guard.dump(), "skipped": self._skipped, "good": self._good}

    @property
    def good(self):
        path = self._run / "checkpoints" / self._good if self._good else None
        return path if path and path.is_dir() else None

    def _skip(self, row):
        self._skipped += 1
        if self._skipped > SKIPS:
            return self._stop(row, f"TRIP, and {SKIPS} updates skipped in a row changed nothing")
        row["skipped"] = True
        return "skip"

    def _locked(self, row):
        if self.mode == "warn":
            if self.guard.counts[LOCKED] == 1:
                self._keep(f"collapse-{row['step']}", picture=True)
            return "go"
        return self._stop(row, f"LOCKED ({'; '.join(self.guard.signals)})")

    def _stop(self, row, why):
        folder = self._keep(f"collapse-{row['step']}", picture=True)
        remedy = (
            "go on from the last good checkpoint with a lower lr, --resume "
            f"{self.good} --out NEW --set lr=..."
            if self.good
            else "no checkpoint was saved before (--set save_every=N)"
        )
        self._end = Collapsed(
            f"step {row['step']}: {why}. {folder} has the trace; {remedy}, or begin again with "
            "residual=mvsplit or layerscale",
            folder,
        )
        return "stop"

    def _keep(self, name, picture=False):
        """Write a folder with the trace, the guard's findings and the last good checkpoint."""
        folder = _unused(self._run / name)
        folder.mkdir(parents=True)
        (folder / "trace.json").write_text(as_json(self._history, self.guard.depth))
        kept, good = load(folder / "trace.json"), self.good
        found = findings(kept, self.guard)
        found["last_good_checkpoint"] = str(good.relative_to(self._run)) if good else None
        (folder / "verdict.json").write_text(json.dumps(found, indent=1) + "\n")
        if picture:
            mean_mode_screaming(kept, self.guard, folder / "trace.png")
        return folder


def _unused(folder):
    names = (folder.name if i == 1 else f"{folder.name}-{i}" for i in range(1, 1000))
    return next(folder.with_name(n) for n in names if not folder.with_name(n).exists())
