"""Traces: what was measured over a run's steps, read from a run or a file and written to one.

A trace file is JSON, each series with steps of its own, any layers, NaN or null where unknown:

    {"config": {"depth": L},
     "scalars": {NAME: {"s": [steps], "v": [values]}},
     "layerwise": {METRIC: {LAYER: {"s": [steps], "v": [values]}}}}

Names are those of model.diagnostics and model.taps; ALIASES are understood too.
"""

import contextlib
import json
import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from model.config import UsageError
from model.stability.guard import Guard, is_number, signals_of

ALIASES = (
    (re.compile(r"(tcs_img|token_sim|TCS)$"), "tcs"),
    (re.compile(r"rho_(\w+_)?img$"), "rho"),
    (re.compile(r"(gradient_norm|grad_norm_raw)$"), "grad_norm"),
)
DEPTHS = ("depth", "N_LAYERS", "n_layers", "num_layers")
RESERVED = ("step", "layerwise")  # what a line of metrics calls something else
READ = ("loss", "grad_norm", "tcs", "rho", "writer_G_mean", "writer_G_ctr", "G_mean", "G_ctr")
STALE = 1.5  # of a series' usual interval: how long a value stands for the steps after it
GAP = 3  # usual intervals without a line


@dataclass
class Trace:
    """Lines as in metrics.jsonl, in order of their steps.

    fresh   the signals that each line measured; what a line repeats of an earlier one is not
    own     the signals that some line measured itself, for which nothing stands in
    notes   sentences on what is odd about it
    """

    title: str
    depth: int
    rows: list
    fresh: list
    own: set
    notes: list = field(default_factory=list)

    @property
    def steps(self):
        return [row["step"] for row in self.rows]

    def series(self, metric, layer=None):
        """(steps, values) where a metric, of a layer if it has them, is a finite number."""
        points = []
        for row in self.rows:
            table = row if layer is None else row["layerwise"].get(metric, {})
            value = table.get(metric if layer is None else layer)
            if is_number(value) and math.isfinite(value):
                points.append((row["step"], value))
        return tuple(zip(*points, strict=True)) or ((), ())

    def layers(self, metric):
        """Those of a metric, in order."""
        found = {layer for row in self.rows for layer in row["layerwise"].get(metric, {})}
        return sorted(found, key=int)


def replay(trace):
    """A Guard that has seen a whole trace."""
    guard = Guard(trace.depth)
    guard.own |= trace.own
    for row, fresh in zip(trace.rows, trace.fresh, strict=True):
        guard.observe(row, fresh)
    return guard


def load(path):
    """The trace of a run's folder, a collapse's, a metrics.jsonl or a trace file."""
    path = Path(path)
    if path.is_dir():
        inside = [path / name for name in ("metrics.jsonl", "trace.json")]
        found = [p for p in inside if p.is_file()]
        if not found:
            raise UsageError(f"{path} holds neither metrics.jsonl nor trace.json")
        path = found[0]
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the trace {path}: {error}") from error
    trace = _of_lines(path, text) if path.suffix == ".jsonl" else _of_file(path, text)
    if not trace.rows:
        raise UsageError(f"{path} holds no line of a step; pass a run that has begun, or a trace")
    _note_gaps(trace)
    return trace


def read_rows(path):
    """The lines of a metrics.jsonl, without a last one that was cut short."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _of_lines(path, text):
    rows, notes, cut = {}, [], 0
    for line in text.splitlines():
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
            layers = (row.get("layerwise") or {}).items()
            row["layerwise"] = {m: {str(int(k)): v for k, v in t.items()} for m, t in layers}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            cut += 1
            continue
        if row["step"] in rows:
            notes.append(f"step {row['step']} is there twice; the later line counts")
        rows[row["step"]] = row
    if cut:
        notes.append(f"{cut} of {len(rows) + cut} lines cannot be read")
    rows = [rows[step] for step in sorted(rows)]
    _fill(rows, rows)
    beside, config = path.with_name("config.json"), {}
    if beside.is_file():
        with contextlib.suppress(ValueError):
            config = json.loads(beside.read_text())
    depth = _depth(config, rows, notes)
    return Trace(str(path), depth, rows, *_told(rows, depth), notes)


def _of_file(path, text):
    try:
        data = json.loads(text)
        scalars, layerwise = data.get("scalars") or {}, data.get("layerwise") or {}
        tables = [((name, None), table) for name, table in scalars.items()]
        tables += [((m, k), t) for m, of in layerwise.items() for k, t in of.items()]
    except (ValueError, AttributeError) as error:
        raise UsageError(
            f"{path}: a trace must be JSON with scalars and layerwise, each series "
            f'{{"s": [steps], "v": [values]}}; {error}'
        ) from error
    notes, series = [], {}
    for (name, layer), table in tables:
        title = name if layer is None else f"{name} of layer {layer}"
        odd = notes if _known(name) in READ else []  # of what nothing is made nothing is said
        samples = _samples(title, table, odd)
        if layer is None and name in RESERVED:
            notes.append(f"{name} is no name of a metric; left out")
        elif layer is not None and not re.fullmatch(r"\d+", layer.strip()):
            notes.append(f"{title}: a layer must be a number; left out")
        elif samples:
            _keep(series, (_known(name), layer and str(int(layer))), name, samples, notes)
    rows, fresh_rows = _aligned({key: samples for key, (_, samples) in series.items()})
    for lines in (rows, fresh_rows):
        _fill(lines, fresh_rows)
    depth = _depth(data.get("config"), rows, notes)
    return Trace(str(path), depth, rows, *_told(fresh_rows, depth), notes)


def _known(name):
    return next((ours for pattern, ours in ALIASES if pattern.match(name)), name)


def _keep(series, key, name, samples, notes):
    """Put samples where those of the same metric are not, or are of a lesser name."""
    before = series.get(key)
    if before is None or _rank(name) > _rank(before[0]):
        series[key] = name, samples
    if before is not None and key[0] in READ:
        notes.append(f"{before[0]} and {name} are both {key[0]}; {series[key][0]} is taken")


def _rank(name):
    """The raw gradient norm before a clipped one, the deepest stage, our own name."""
    numbers = [int(n) for n in re.findall(r"\d+", name)]
    return "raw" in name, max(numbers, default=-1), _known(name) == name


def _samples(title, table, notes):
    """{step: value or None} of a series, whatever is in it."""
    try:
        steps, values = list(table["s"]), list(table["v"])
    except (KeyError, TypeError):
        notes.append(f"{title} is no series of s and v")
        return {}
    if len(steps) != len(values):
        notes.append(
            f"{title} has {len(steps)} steps and {len(values)} values; the rest is dropped"
        )
    samples, bad = {}, 0
    for step, value in zip(steps, values, strict=False):
        try:
            step = int(step)
        except (TypeError, ValueError, OverflowError):
            bad += 1
            continue
        bad += not is_number(value)
        samples[step] = value if is_number(value) else None
    if bad:
        notes.append(f"{title}: {bad} of {len(steps)} values are no numbers")
    return samples


def _aligned(series):
    """Lines at every step of any series, and the same with what was measured there alone."""
    steps = sorted({step for samples in series.values() for step in samples})
    rows = [{"step": step, "layerwise": {}} for step in steps]
    fresh = [{"step": step, "layerwise": {}} for step in steps]
    for (name, layer), samples in series.items():
        own = sorted(samples)
        usual = (
            statistics.median(b - a for a, b in zip(own, own[1:], strict=False)) if own[1:] else 1
        )
        last = None
        for step, row, new in zip(steps, rows, fresh, strict=True):
            if step in samples:
                last = step
                _put(new, name, layer, samples[step])
            if last is not None and step - last < max(1, STALE * usual):
                _put(row, name, layer, samples[last])
    return rows, fresh


def _put(row, name, layer, value):
    if layer is None:
        row[name] = value
    else:
        row["layerwise"].setdefault(name, {})[layer] = value


def _fill(rows, layers_of):
    """A layer that a line lacks is missing there: no other takes the place of the last block."""
    for metric in ("tcs", "rho"):
        layers = {layer for row in layers_of for layer in row["layerwise"].get(metric, {})}
        for row in rows:
            if metric in row["layerwise"]:
                row["layerwise"][metric] = dict.fromkeys(layers) | row["layerwise"][metric]


def _told(rows, depth):
    """The signals that each line tells, and those that some line tells itself."""
    own = set()
    for row in rows:
        values, stand_ins = signals_of(row, depth)
        own |= {n for n, v in values.items() if v is not None} - stand_ins.keys()
    values = [signals_of(row, depth, own)[0] for row in rows]
    return [{n for n, v in told.items() if v is not None} for told in values], own


def _depth(config, rows, notes):
    """Of a configuration, or at least of the layers there are."""
    told = [config[n] for n in DEPTHS if n in config] if isinstance(config, dict) else []
    if told and isinstance(told[0], int) and told[0] > 0:
        return told[0]
    layers = {int(k) for row in rows for table in row["layerwise"].values() for k in table}
    depth = max(layers, default=0) + 1
    notes.append(f"the depth is not told; {depth}, from the layers there are")
    return depth


def _note_gaps(trace):
    pairs = list(zip(trace.steps, trace.steps[1:], strict=False))
    intervals = sorted(b - a for a, b in pairs)
    usual = intervals[int(0.9 * (len(intervals) - 1))] if intervals else 1  # some parts are denser
    gaps = [(a, b) for a, b in pairs if b - a > GAP * usual]
    for a, b in gaps[:5]:
        trace.notes.append(f"no line between steps {a} and {b}")
    if gaps[5:]:
        trace.notes.append(f"{len(gaps) - 5} more gaps")


def as_json(rows, depth):
    """A trace file's text of lines of metrics; what is not finite is null."""
    scalars, layerwise = {}, {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                _append(scalars.setdefault(name, {"s": [], "v": []}), row["step"], value)
        for metric, table in row["layerwise"].items():
            for layer, value in table.items():
                of = layerwise.setdefault(metric, {}).setdefault(layer, {"s": [], "v": []})
                _append(of, row["step"], value)
    data = {"config": {"depth": depth}, "scalars": scalars, "layerwise": layerwise}
    return json.dumps(data, allow_nan=False) + "\n"


def _append(series, step, value):
    series["s"].append(step)
    known = value is not None and math.isfinite(value)
    series["v"].append(float(f"{value:.7g}") if known else None)
