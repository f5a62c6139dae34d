"""The collapse guard, which detects that a run falls into its token mean.

It reads the metrics of every step (model.stability.metrics) and gives each step a state:

    WATCH   The raw gradient norm is an outlier of its last WINDOW steps in two consecutive
            samples: the robust z-score of its logarithm (median and MAD) is above 6. Healthy runs
            have single bursts.
    TRIP    Two of these three kinds of evidence in one step:
              trunk     TCS of the last block above 0.9, or rho above 2 x its median
              gradient  G_mean / G_ctr above 10 and above 4 x its median, or the gradient norm
                        above 10 x its median
              loss      above 1.25 x its median
            Medians are over the last WINDOW steps. Two kinds are required, not two signals,
            because TCS and rho carry the same information and gradients are large after a restart.
    LOCKED  TCS above 0.98 in the last block and above 0.95 at three quarters of the depth, and
            G_ctr below 1 % of its maximum so far, in two consecutive samples. No run recovered from
            this state; a run of MV-Split did recover from TCS 0.9999 with G_ctr at 2 %.

A missing value (None or NaN) is not evidence. `describe_missing` lists the signals that the lines
did not contain. The thresholds were chosen on the runs in bench/LOG.md.
"""

import bisect
import collections
import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from model.stability.signals import SIGNALS, MetricsRow, quotient, read_signals

WINDOW = 300  # steps of a trailing median
MEDIAN_SAMPLES = 5  # fewest samples of a median
ENOUGH_SAMPLES = 20  # fewest of a z-score; kept beyond WINDOW where steps are sparse
CONSECUTIVE = 2  # samples that WATCH and LOCKED need in a row
WATCH_Z = 6.0
LEAST_SPREAD = 0.02  # of a logarithm: a change of 2 % of an almost constant norm is no outlier
TRIP_TCS, TRIP_RHO, TRIP_NORM, TRIP_LOSS = 0.9, 2.0, 10.0, 1.25
TRIP_RATIO, MEAN_DOMINATED = 4.0, 10.0  # multiple of the median, and absolute
LOCK_LAST, LOCK_THREE_QUARTERS, LOCK_CENTRED = 0.98, 0.95, 0.01
CALM = 50  # steps after a TRIP in which every step is written and no checkpoint is saved

QUIET, WATCH, TRIP, LOCKED = STATES = ("quiet", "WATCH", "TRIP", "LOCKED")

_UNDECIDABLE = {  # consequence of a signal that no line contains
    "tcs": "; LOCKED cannot be detected",
    "centred": "; LOCKED cannot be detected",
    "tcs_three_quarters": "; LOCKED depends only on the deepest recorded block",
    "grad_norm": "; WATCH cannot be detected",
}


class Detection(NamedTuple):
    """A step and the signals that put it into a state."""

    step: int
    signals: list[str]


class TrailingSamples:
    """Samples of a signal in the last WINDOW steps, or ENOUGH_SAMPLES where steps are sparse."""

    def __init__(self, samples: Iterable[tuple[int, float]] = ()) -> None:
        self.samples = collections.deque(samples)
        self._sorted = sorted(value for _, value in self.samples)

    def add(self, step: int, value: float) -> None:
        self.samples.append((step, value))
        bisect.insort(self._sorted, value)
        while len(self.samples) > ENOUGH_SAMPLES and self.samples[0][0] <= step - WINDOW:
            self._sorted.remove(self.samples.popleft()[1])

    def median(self) -> float | None:
        """Return the median, or None with fewer than MEDIAN_SAMPLES."""
        return statistics.median(self._sorted) if len(self._sorted) >= MEDIAN_SAMPLES else None

    def z_score(self, value: float) -> float | None:
        """Return the robust z-score of log(value), or None with fewer than ENOUGH_SAMPLES."""
        logs = [math.log(v) for v in self._sorted if 0 < v < math.inf]
        if len(logs) < ENOUGH_SAMPLES or not value > 0:
            return None
        median = statistics.median(logs)
        spread = statistics.median(abs(v - median) for v in logs)
        return (math.log(value) - median) / max(1.4826 * spread, LEAST_SPREAD)


class Guard:
    """State machine over the lines of metrics of one run.

    state, signals  state of the last line, and the signals that caused it
    first           {state: first Detection}
    counts          {state: number of lines}
    last_trip       last step in TRIP or LOCKED, or None
    measured        signals that at least one line measured without a substitute
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.first: dict[str, Detection] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.samples = 0
        self.signal_counts: collections.Counter[str] = collections.Counter()
        self.substitutes: dict[str, str] = {}
        self.state = QUIET
        self.signals: list[str] = []
        self.last_trip: int | None = None
        self.measured: set[str] = set()
        self._warnings: list[int] = []  # steps of WATCH and TRIP in the WINDOW before LOCKED
        names = ("loss", "grad_norm", "rho", "ratio")
        self._series = {name: TrailingSamples() for name in names}
        self._most_centred = 0.0
        self._running = {WATCH: 0, LOCKED: 0}

    def observe(self, row: MetricsRow, fresh: set[str] | None = None) -> str:
        """Return the state after one more line of metrics.

        fresh  signals that were measured at this step; None: all signals in the line. Pass it where
               a line repeats values of earlier steps.
        """
        step = row["step"]
        signals = read_signals(row, self.depth, self.measured)
        self._add_measured(signals.measured)
        self.substitutes |= signals.substitutes
        self.samples += 1
        fresh = signals.available if fresh is None else signals.available & fresh
        self.signal_counts.update(fresh)
        values = signals.values
        evidence = {
            WATCH: self._watch(values, fresh),
            TRIP: self._trip(values),
            LOCKED: self._locked(values, fresh),
        }
        for name, series in self._series.items():
            value = values[name]
            if name in fresh and value is not None and math.isfinite(value):
                series.add(step, value)
        self._update_state(step, evidence)
        return self.state

    def _update_state(self, step: int, evidence: dict[str, list[str]]) -> None:
        if LOCKED not in self.first:
            self._warnings = [s for s in self._warnings if s >= step - WINDOW]
            if not evidence[LOCKED] and (evidence[WATCH] or evidence[TRIP]):
                self._warnings.append(step)
        self.state, self.signals = QUIET, []
        for state, signals in evidence.items():  # in order of severity: the last one decides
            if signals:
                self.state, self.signals = state, signals
                self.first.setdefault(state, Detection(step, signals))
                self.counts[state] += 1
        if self.state in (TRIP, LOCKED):
            self.last_trip = step

    def _add_measured(self, names: set[str]) -> None:
        if "centred" in names - self.measured:
            self._most_centred = 0.0  # until now the maximum of its substitute
        for name in names - self.measured:
            self.substitutes.pop(name, None)
        self.measured |= names

    def is_calm(self, step: int) -> bool:
        """Check that the last TRIP is more than CALM steps ago."""
        return self.last_trip is None or step > self.last_trip + CALM

    def _is_consecutive(self, state: str, condition: bool) -> bool:
        self._running[state] = self._running[state] + 1 if condition else 0
        return self._running[state] >= CONSECUTIVE

    def _watch(self, values: dict[str, float | None], fresh: set[str]) -> list[str]:
        norm = values["grad_norm"]
        if norm is None or "grad_norm" not in fresh:
            return []
        z = self._series["grad_norm"].z_score(norm)
        outlier = z is not None and z > WATCH_Z
        if not self._is_consecutive(WATCH, outlier):
            return []
        return [
            f"gradient norm {norm:.3g}, z-score {z:.1f} > {WATCH_Z:g}, in two consecutive samples"
        ]

    def _trip(self, values: dict[str, float | None]) -> list[str]:
        tcs = values["tcs"]
        high_tcs = tcs is not None and tcs > TRIP_TCS
        evidence = {
            "trunk": [
                f"TCS {tcs:.4f} > {TRIP_TCS}" if high_tcs else None,
                self._above_median("rho", values["rho"], "rho", TRIP_RHO),
            ],
            "gradient": [
                self._above_median(
                    "G_mean/G_ctr", values["ratio"], "ratio", TRIP_RATIO, MEAN_DOMINATED
                ),
                self._above_median("gradient norm", values["grad_norm"], "grad_norm", TRIP_NORM),
            ],
            "loss": [self._above_median("loss", values["loss"], "loss", TRIP_LOSS)],
        }
        kinds = [[signal for signal in kind if signal] for kind in evidence.values()]
        return [s for kind in kinds for s in kind] if sum(map(bool, kinds)) >= 2 else []

    def _above_median(
        self, title: str, value: float | None, name: str, times: float, least: float = 0.0
    ) -> str | None:
        """Return a description if value > max(times x median, least), else None."""
        median = self._series[name].median()
        if value is None or median is None or not value > max(times * median, least):
            return None
        return f"{title} {value:.3g} > {times:g} x {median:.3g}"

    def _locked(self, values: dict[str, float | None], fresh: set[str]) -> list[str]:
        tcs, centred = values["tcs"], values["centred"]
        if centred is not None and math.isfinite(centred):
            self._most_centred = max(self._most_centred, centred)
        if tcs is None or centred is None or "tcs" not in fresh:
            return []
        share = quotient(centred, self._most_centred)
        shallow = values["tcs_three_quarters"]
        collapsed = (
            tcs > LOCK_LAST
            and (shallow is None or shallow > LOCK_THREE_QUARTERS)
            and share is not None
            and share < LOCK_CENTRED
        )
        if not self._is_consecutive(LOCKED, collapsed):
            return []
        return [
            f"TCS {tcs:.4f} > {LOCK_LAST}",
            *([] if shallow is None else [f"at 3/4 depth {shallow:.4f} > {LOCK_THREE_QUARTERS}"]),
            f"G_ctr {share:.2g} < {LOCK_CENTRED} of its maximum, in two consecutive samples",
        ]

    def describe_missing(self) -> list[str]:
        """Return a sentence for each signal that lines lack, with the consequence."""
        sentences = []
        for name, title in SIGNALS.items():
            count, substitute = self.signal_counts[name], self.substitutes.get(name)
            if not count:
                sentences.append(f"{title}: in no line{_UNDECIDABLE.get(name, '')}")
            elif count < self.samples or substitute:
                suffix = f"; replaced by {substitute}" if substitute else ""
                sentences.append(f"{title}: in {count} of {self.samples} lines{suffix}")
        return sentences

    @property
    def lead_steps(self) -> int | None:
        """Steps between the first WATCH or TRIP in the WINDOW before LOCKED and LOCKED, or None."""
        if LOCKED not in self.first or not self._warnings:
            return None
        return self.first[LOCKED].step - self._warnings[0]

    def reset_detections(self) -> None:
        """Forget the detections but keep the statistics, for a run that branches off this one."""
        self.first, self.counts, self._warnings = {}, collections.Counter(), []

    def dump(self) -> dict[str, Any]:
        """Return the state that `load` restores, for JSON. The keys are a file format."""
        return {
            "series": {name: list(series.samples) for name, series in self._series.items()},
            "most_centred": self._most_centred, "running": self._running, "first": self.first,
            "counts": dict(self.counts), "samples": self.samples, "told": dict(self.signal_counts),
            "stand_ins": self.substitutes, "own": sorted(self.measured),
            "last_trip": self.last_trip, "warnings": self._warnings,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state that `dump` returned."""
        self._series = {
            name: TrailingSamples((step, value) for step, value in samples)
            for name, samples in state["series"].items()
        }
        self._most_centred, self._running = state["most_centred"], dict(state["running"])
        self.first = {name: Detection(*detection) for name, detection in state["first"].items()}
        self.counts = collections.Counter(state["counts"])
        self.signal_counts = collections.Counter(state["told"])
        self.samples, self.substitutes = state["samples"], dict(state["stand_ins"])
        self.measured = set(state["own"])
        self.last_trip, self._warnings = state["last_trip"], state["warnings"]
