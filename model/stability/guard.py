"""The collapse guard: sees a run fall into its token mean while there is time to keep a checkpoint.

    WATCH   the raw gradient norm stands out of its last WINDOW steps, twice running: a robust
            z-score (median and MAD of its logarithm) above 6. Healthy runs have single bursts.
    TRIP    two kinds of evidence at once, of
              trunk     TCS above 0.9 in the last block, or rho above 2 x its median
              gradient  G_mean / G_ctr above 10 and 4 x its median, or its norm above 10 x
              loss      above 1.25 x its median
            each median over the last WINDOW steps. TCS and rho say the same thing, and gradients
            alone are large after a restart: so two kinds, not any two signals.
    LOCKED  TCS above 0.98 in the last block and above 0.95 three quarters of the way, and G_ctr
            below 1 % of its greatest value so far, twice running. Nothing came back from there;
            from TCS 0.9999 and 2 % a run of MV-Split did.

A value that is missing (None, NaN) is no evidence; what a run never told is named by `missing`.
The thresholds rest on the runs in bench/LOG.md.
"""

import bisect
import collections
import math
import statistics

WINDOW = 300  # steps of a trailing median
FEWEST, ENOUGH = 5, 20  # samples of a median; of a z-score, and of a window where steps are sparse
TWICE = 2
WATCH_Z = 6.0
FLAT = 0.02  # least spread of a logarithm: of what hardly moves at all, 2 % is not remarkable
TRIP_TCS, TRIP_RHO, TRIP_NORM, TRIP_LOSS = 0.9, 2.0, 10.0, 1.25
TRIP_RATIO, MEAN_DOMINATED = 4.0, 10.0  # of its median, and at least
LOCK_LAST, LOCK_THREE_QUARTERS, LOCK_CENTRED = 0.98, 0.95, 0.01
CALM = 50  # steps after a TRIP during which every step is written and no checkpoint is

QUIET, WATCH, TRIP, LOCKED = STATES = ("quiet", "WATCH", "TRIP", "LOCKED")

SIGNALS = {
    "loss": "loss",
    "grad_norm": "raw gradient norm (grad_norm)",
    "tcs": "TCS of the last block (tcs)",
    "tcs_three_quarters": "TCS three quarters of the way (tcs)",
    "rho": "rho of the last block (rho)",
    "ratio": "G_mean / G_ctr of the writers (writer_G_mean, writer_G_ctr)",
    "centred": "G_ctr of the writers (writer_G_ctr)",
}


def signals_of(row, depth, own=()):
    """{signal: value or None} of a line of metrics, and {signal: what stands in for it}.

    Layers are those the line has: the last one stands for the last block, the one nearest to three
    quarters of the depth for that. Where tokens are of one length TCS is rho^2 / (1 + rho^2).

    own   signals for which nothing may stand in, since other lines have them
    """
    stand_ins = {}
    tcs, rho = (_by_layer(row, name) for name in ("tcs", "rho"))
    if not tcs and rho and "tcs" not in own:
        tcs = {layer: _cosine(value) for layer, value in rho.items()}
        stand_ins["tcs"] = "rho^2 / (1 + rho^2)"
    values = {"loss": row.get("loss"), "grad_norm": row.get("grad_norm")}
    values["tcs"] = tcs[max(tcs)] if tcs else None
    others = sorted(tcs)[:-1]
    nearest = min(others, key=lambda layer: abs(layer - 0.75 * depth)) if others else None
    values["tcs_three_quarters"] = None if nearest is None else tcs[nearest]
    values["rho"] = rho[max(rho)] if rho else None
    G_mean, G_ctr = (_writers(row, f"writer_{part}") for part in ("G_mean", "G_ctr"))
    ratio = _quotient(G_mean, G_ctr)
    values["ratio"] = row.get("writer_ratio") if ratio is None else ratio
    values["centred"] = G_ctr
    if G_ctr is None and "centred" not in own:
        name = next((n for n in ("deep_Q", "global_Q") if _number(row.get(n)) is not None), None)
        if name:
            values["centred"] = row[name]
            stand_ins["centred"] = f"the gradient norm of W_Q ({name})"
    return {name: _number(value) for name, value in values.items()}, stand_ins


def _by_layer(row, metric):
    """{layer: value} of a metric; of one without layers, {inf: value}."""
    table = row.get("layerwise", {}).get(metric)
    if table:
        return {int(layer): _number(value) for layer, value in table.items()}
    return {math.inf: _number(row[metric])} if metric in row else {}


def _writers(row, name):
    value = _number(row.get(name))
    return writer_totals(row.get("layerwise", {})).get(name) if value is None else value


def writer_totals(layerwise):
    """writer_G_mean and writer_G_ctr: root sum square over layers and both writers."""
    totals = {}
    for part in ("G_mean", "G_ctr"):
        names = (f"{part}_attention", f"{part}_ffn", f"writer_{part}", part)
        tables = (layerwise.get(name, {}) for name in names)
        values = [value for table in tables for value in table.values() if is_number(value)]
        if values:
            totals[f"writer_{part}"] = math.hypot(*values)
    return totals


def is_number(value):
    """Neither None nor NaN nor anything else that a file may hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _number(value):
    return value if is_number(value) else None


def _quotient(a, b):
    if a is None or b is None or a == b == 0:
        return None
    return a / b if b else math.inf


def _cosine(rho):
    if rho is None:
        return None
    return 1.0 if math.isinf(rho) else rho * rho / (1 + rho * rho)


class Series:
    """The last samples of a signal, of WINDOW steps; ENOUGH of them where steps are sparse."""

    def __init__(self, samples=()):
        self.samples = collections.deque(samples)
        self._sorted = sorted(value for _, value in self.samples)

    def add(self, step, value):
        self.samples.append((step, value))
        bisect.insort(self._sorted, value)
        while len(self.samples) > ENOUGH and self.samples[0][0] <= step - WINDOW:
            self._sorted.remove(self.samples.popleft()[1])

    def median(self):
        """None with less than FEWEST samples."""
        return statistics.median(self._sorted) if len(self._sorted) >= FEWEST else None

    def z_score(self, value):
        """Of the logarithm, by median and MAD; None with less than ENOUGH samples."""
        logs = [math.log(v) for v in self._sorted if 0 < v < math.inf]
        if len(logs) < ENOUGH or not value > 0:
            return None
        median = statistics.median(logs)
        spread = statistics.median(abs(v - median) for v in logs)
        return (math.log(value) - median) / max(1.4826 * spread, FLAT)


class Guard:
    """Watches a run, line by line.

    state, signals   of the last line, and what made it
    first            {state: (step, signals)} where each was first seen;  counts: how often
    """

    def __init__(self, depth):
        self.depth = depth
        self.first, self.counts = {}, collections.Counter()
        self.samples, self.told, self.stand_ins = 0, collections.Counter(), {}
        self.state, self.signals, self.last_trip = QUIET, [], None
        self._warnings = []  # steps of WATCH and TRIP in the WINDOW before LOCKED
        self._series = {name: Series() for name in ("loss", "grad_norm", "rho", "ratio")}
        self._most_centred, self._running = 0.0, {WATCH: 0, LOCKED: 0}
        self.own = set()  # signals that were measured themselves, once at least

    def observe(self, row, fresh=None):
        """The state after a line of metrics; `signals` says what made it.

        fresh   the signals that were measured at this step, if the line repeats older values
        """
        now, stand_ins = signals_of(row, self.depth, self.own)
        self._note_own({n for n, v in now.items() if v is not None} - stand_ins.keys())
        self.stand_ins |= stand_ins
        self.samples += 1
        given = {name for name, value in now.items() if value is not None}
        fresh = given if fresh is None else given & fresh
        self.told.update(fresh)
        found = {
            WATCH: self._watch(now, fresh), TRIP: self._trip(now), LOCKED: self._locked(now, fresh),
        }  # fmt: skip
        for name, series in self._series.items():
            if name in fresh and math.isfinite(now[name]):
                series.add(row["step"], now[name])
        self.state, self.signals = QUIET, []
        if LOCKED not in self.first:
            self._warnings = [s for s in self._warnings if s >= row["step"] - WINDOW]
            if not found[LOCKED] and (found[WATCH] or found[TRIP]):
                self._warnings.append(row["step"])
        for state, signals in found.items():  # the gravest last
            if signals:
                self.state, self.signals = state, signals
                self.first.setdefault(state, (row["step"], signals))
                self.counts[state] += 1
        if self.state in (TRIP, LOCKED):
            self.last_trip = row["step"]
        return self.state

    def _note_own(self, names):
        if "centred" in names - self.own:
            self._most_centred = 0.0  # so far it was of what stood in
        for name in names - self.own:
            self.stand_ins.pop(name, None)
        self.own |= names

    def calm(self, step):
        """Is the last TRIP more than CALM steps ago?"""
        return self.last_trip is None or step > self.last_trip + CALM

    def _twice(self, state, seen):
        self._running[state] = self._running[state] + 1 if seen else 0
        return self._running[state] >= TWICE

    def _watch(self, now, fresh):
        if "grad_norm" not in fresh:
            return []
        z = self._series["grad_norm"].z_score(now["grad_norm"])
        if not self._twice(WATCH, z is not None and z > WATCH_Z):
            return []
        return [
            f"gradient norm {now['grad_norm']:.3g}, z-score {z:.1f} > {WATCH_Z:g}, twice running"
        ]

    def _trip(self, now):
        kinds = {
            "trunk": [
                _above("TCS", now["tcs"], TRIP_TCS),
                self._above_median("rho", now["rho"], "rho", TRIP_RHO),
            ],
            "gradient": [
                self._above_median(
                    "G_mean/G_ctr", now["ratio"], "ratio", TRIP_RATIO, MEAN_DOMINATED
                ),
                self._above_median("gradient norm", now["grad_norm"], "grad_norm", TRIP_NORM),
            ],
            "loss": [self._above_median("loss", now["loss"], "loss", TRIP_LOSS)],
        }
        kinds = [[signal for signal in found if signal] for found in kinds.values()]
        return sum(kinds, []) if sum(map(bool, kinds)) >= 2 else []

    def _above_median(self, title, value, name, times, least=0.0):
        median = self._series[name].median()
        if value is None or median is None or not value > max(times * median, least):
            return None
        return f"{title} {value:.3g} > {times:g} x {median:.3g}"

    def _locked(self, now, fresh):
        if now["centred"] is not None and math.isfinite(now["centred"]):
            self._most_centred = max(self._most_centred, now["centred"])
        if now["tcs"] is None or now["centred"] is None or "tcs" not in fresh:
            return []
        share = _quotient(now["centred"], self._most_centred)
        shallow = now["tcs_three_quarters"]
        seen = (
            now["tcs"] > LOCK_LAST
            and (shallow is None or shallow > LOCK_THREE_QUARTERS)
            and share is not None
            and share < LOCK_CENTRED
        )
        if not self._twice(LOCKED, seen):
            return []
        return [
            f"TCS {now['tcs']:.4f} > {LOCK_LAST}",
            *([] if shallow is None else [f"{shallow:.4f} > {LOCK_THREE_QUARTERS} before"]),
            f"G_ctr {share:.2g} < {LOCK_CENTRED} of its greatest, twice running",
        ]

    def missing(self):
        """Sentences: what the lines did not tell, and what that leaves undecided."""
        lines = []
        for name, title in SIGNALS.items():
            instead = f"; {self.stand_ins[name]} stands in" if name in self.stand_ins else ""
            if not self.told[name]:
                lines.append(f"{title}: in no line{_without(name)}")
            elif self.told[name] < self.samples or instead:
                lines.append(f"{title}: in {self.told[name]} of {self.samples} lines{instead}")
        return lines

    def lead(self):
        """Steps from the first WATCH or TRIP of the WINDOW before LOCKED to it, or None."""
        if LOCKED not in self.first or not self._warnings:
            return None
        return self.first[LOCKED][0] - self._warnings[0]

    def begin_anew(self):
        """Forget what was found, not what is usual: another run goes on from here."""
        self.first, self.counts, self._warnings = {}, collections.Counter(), []

    def dump(self):
        """All that the next `observe` depends on, for JSON."""
        return {
            "series": {name: list(series.samples) for name, series in self._series.items()},
            "most_centred": self._most_centred, "running": self._running, "first": self.first,
            "counts": dict(self.counts), "samples": self.samples, "told": dict(self.told),
            "stand_ins": self.stand_ins, "own": sorted(self.own), "last_trip": self.last_trip,
            "warnings": self._warnings,
        }  # fmt: skip

    def load(self, state):
        """Go on from what `dump` gave."""
        self._series = {
            name: Series(map(tuple, samples)) for name, samples in state["series"].items()
        }
        self._most_centred, self._running = state["most_centred"], dict(state["running"])
        self.first = {name: tuple(found) for name, found in state["first"].items()}
        self.counts, self.told = (collections.Counter(state[n]) for n in ("counts", "told"))
        self.samples, self.stand_ins = state["samples"], dict(state["stand_ins"])
        self.own = set(state["own"])
        self.last_trip, self._warnings = state["last_trip"], state["warnings"]


def _above(title, value, bound):
    return None if value is None or not value > bound else f"{title} {value:.4f} > {bound}"


def _without(name):
    """What cannot be told without a signal."""
    if name in ("tcs", "centred"):
        return "; LOCKED cannot be told"
    if name == "tcs_three_quarters":
        return "; LOCKED rests on the last block recorded"
    return "; WATCH cannot be told" if name == "grad_norm" else ""
