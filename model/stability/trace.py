"""Traces: the metrics of a run's steps, read from a run or a trace file and written to one.

A trace file is JSON. Each series has its own steps; layers are arbitrary; NaN or null is unknown:

    {"config": {"depth": L},
     "scalars": {NAME: {"s": [steps], "v": [values]}},
     "layerwise": {METRIC: {LAYER: {"s": [steps], "v": [values]}}}}

Names are those of model.stability.metrics and taps; the other names in ALIASES are accepted too.
"""

import contextlib
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from model.config import UsageError
from model.stability.guard import Guard
from model.stability.signals import MetricsRow, is_number, read_signals

ALIASES = (
    (re.compile(r"(tcs_img|token_sim|TCS)$"), "tcs"),
    (re.compile(r"rho_(\w+_)?img$"), "rho"),
    (re.compile(r"(gradient_norm|grad_norm_raw)$"), "grad_norm"),
)
DEPTH_FIELDS = ("depth", "N_LAYERS", "n_layers", "num_layers")
ROW_FIELDS = ("step", "layerwise")  # not names of metrics
JUDGED = ("loss", "grad_norm", "tcs", "rho", "writer_G_mean", "writer_G_ctr", "G_mean", "G_ctr")
STALE = 1.5  # of a series' median interval: for that long a value is repeated in later lines
GAP = 3  # of the usual interval: a longer one without a line is reported

Samples: TypeAlias = dict[int, float | None]  # {step: value}
SeriesKey: TypeAlias = tuple[str, str | None]  # metric; layer, or None for a scalar


@dataclass
class Trace:
    """Lines as in metrics.jsonl, sorted by step.

    fresh     for each line the signals measured at its step; repeated values are not included
    measured  signals that at least one line measured, so that no substitute is used
    notes     sentences on irregularities of the file
    """

    title: str
    depth: int
    rows: list[MetricsRow]
    fresh: list[set[str]]
    measured: set[str]
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows]

    def series(
        self, metric: str, layer: str | None = None
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return (steps, values) of a metric, at a layer if it has layers; finite values only."""
        points = []
        for row in self.rows:
            table = row if layer is None else row["layerwise"].get(metric, {})
            value = table.get(metric if layer is None else layer)
            if is_number(value) and math.isfinite(value):
                points.append((row["step"], value))
        return tuple(step for step, _ in points), tuple(value for _, value in points)

    def layers(self, metric: str) -> list[str]:
        """Return the layers of a metric from first to last."""
        return sorted(_layers(self.rows, metric), key=int)


def replay_guard(trace: Trace) -> Guard:
    """Return a Guard that has observed a whole trace."""
    guard = Guard(trace.depth)
    guard.measured |= trace.measured
    for row, fresh in zip(trace.rows, trace.fresh, strict=True):
        guard.observe(row, fresh)
    return guard


def load_trace(path: str | Path) -> Trace:
    """Return the trace of a run's folder, a collapse folder, a metrics.jsonl or a trace file."""
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in ("metrics.jsonl", "trace.json")]
        existing = [p for p in files if p.is_file()]
        if not existing:
            raise UsageError(f"{path} contains neither metrics.jsonl nor trace.json")
        path = existing[0]
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the trace {path}: {error}") from error
    trace = _parse_lines(path, text) if path.suffix == ".jsonl" else _parse_series(path, text)
    if not trace.rows:
        raise UsageError(
            f"{path} contains no line of a step; pass a trace, or a run that has taken a step"
        )
    _note_gaps(trace)
    return trace


def read_rows(path: Path) -> list[MetricsRow]:
    """Return the lines of a metrics.jsonl, without a last line that was cut short."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _parse_lines(path: Path, text: str) -> Trace:
    by_step: dict[int, MetricsRow] = {}
    notes: list[str] = []
    unreadable = 0
    for line in text.splitlines():
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
            layers = (row.get("layerwise") or {}).items()
            row["layerwise"] = {m: {str(int(k)): v for k, v in t.items()} for m, t in layers}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            unreadable += 1
            continue
        if row["step"] in by_step:
            notes.append(f"step {row['step']} occurs twice; the later line is used")
        by_step[row["step"]] = row
    if unreadable:
        notes.append(f"{unreadable} of {len(by_step) + unreadable} lines cannot be read")
    rows = [by_step[step] for step in sorted(by_step)]
    _add_missing_layers(rows, rows)
    config, config_path = {}, path.with_name("config.json")
    if config_path.is_file():
        with contextlib.suppress(ValueError):
            config = json.loads(config_path.read_text())
    depth = _depth(config, rows, notes)
    return Trace(str(path), depth, rows, *_measured_signals(rows, depth), notes)


def _parse_series(path: Path, text: str) -> Trace:
    try:
        data = json.loads(text)
        scalars, layerwise = data.get("scalars") or {}, data.get("layerwise") or {}
        tables: list[tuple[SeriesKey, Any]] = [((n, None), table) for n, table in scalars.items()]
        tables += [((m, k), t) for m, layers in layerwise.items() for k, t in layers.items()]
    except (ValueError, AttributeError) as error:
        raise UsageError(
            f"{path}: a trace must be JSON with scalars and layerwise, each series "
            f'{{"s": [steps], "v": [values]}}; {error}'
        ) from error
    notes: list[str] = []
    series: dict[SeriesKey, tuple[str, Samples]] = {}
    for (name, layer), table in tables:
        title = name if layer is None else f"{name} of layer {layer}"
        judged = _canonical_name(name) in JUDGED
        samples = _samples(title, table, notes if judged else [])
        if layer is None and name in ROW_FIELDS:
            notes.append(f"{name} is not a valid name of a metric; ignored")
        elif layer is not None and not re.fullmatch(r"\d+", layer.strip()):
            notes.append(f"{title}: a layer must be a number; ignored")
        elif samples:
            key = _canonical_name(name), layer and str(int(layer))
            _store_preferred(series, key, name, samples, notes)
    rows, fresh_rows = _align({key: samples for key, (_, samples) in series.items()})
    for lines in (rows, fresh_rows):
        _add_missing_layers(lines, fresh_rows)
    depth = _depth(data.get("config"), rows, notes)
    return Trace(str(path), depth, rows, *_measured_signals(fresh_rows, depth), notes)


def _canonical_name(name: str) -> str:
    return next((metric for pattern, metric in ALIASES if pattern.match(name)), name)


def _store_preferred(
    series: dict[SeriesKey, tuple[str, Samples]],
    key: SeriesKey,
    name: str,
    samples: Samples,
    notes: list[str],
) -> None:
    """Store the samples, unless those already stored for the metric have a preferred name."""
    before = series.get(key)
    if before is None or _preference(name) > _preference(before[0]):
        series[key] = name, samples
    if before is not None and key[0] in JUDGED:
        notes.append(f"{before[0]} and {name} are both {key[0]}; {series[key][0]} is used")


def _preference(name: str) -> tuple[bool, int, bool]:
    """Prefer a raw gradient norm to a clipped one, the deepest stage, and the canonical name."""
    numbers = [int(n) for n in re.findall(r"\d+", name)]
    return "raw" in name, max(numbers, default=-1), _canonical_name(name) == name


def _samples(title: str, table: Any, notes: list[str]) -> Samples:
    """Return the samples of a series from a file, which may contain anything."""
    try:
        steps, values = list(table["s"]), list(table["v"])
    except (KeyError, TypeError):
        notes.append(f"{title} is not a series of s and v")
        return {}
    if len(steps) != len(values):
        notes.append(
            f"{title} has {len(steps)} steps and {len(values)} values; the excess is ignored"
        )
    samples: Samples = {}
    invalid = 0
    for step, value in zip(steps, values, strict=False):
        try:
            step = int(step)
        except (TypeError, ValueError, OverflowError):
            invalid += 1
            continue
        invalid += not is_number(value)
        samples[step] = value if is_number(value) else None
    if invalid:
        notes.append(f"{title}: {invalid} of {len(steps)} values are not numbers")
    return samples


def _align(series: Mapping[SeriesKey, Samples]) -> tuple[list[MetricsRow], list[MetricsRow]]:
    """Return a line for every step of any series, and the same with fresh values only.

    The first lines repeat the last value of a series for up to STALE of its intervals.
    """
    steps = sorted({step for samples in series.values() for step in samples})
    rows: list[MetricsRow] = [{"step": step, "layerwise": {}} for step in steps]
    fresh: list[MetricsRow] = [{"step": step, "layerwise": {}} for step in steps]
    for (name, layer), samples in series.items():
        sampled = sorted(samples)
        intervals = [b - a for a, b in zip(sampled, sampled[1:], strict=False)]
        usual = statistics.median(intervals) if intervals else 1
        last = None
        for step, row, fresh_row in zip(steps, rows, fresh, strict=True):
            if step in samples:
                last = step
                _put(fresh_row, name, layer, samples[step])
            if last is not None and step - last < max(1, STALE * usual):
                _put(row, name, layer, samples[last])
    return rows, fresh


def _put(row: MetricsRow, name: str, layer: str | None, value: float | None) -> None:
    if layer is None:
        row[name] = value
    else:
        row["layerwise"].setdefault(name, {})[layer] = value


def _layers(rows: Iterable[MetricsRow], metric: str) -> set[str]:
    return {layer for row in rows for layer in row["layerwise"].get(metric, {})}


def _add_missing_layers(rows: Sequence[MetricsRow], layer_rows: Sequence[MetricsRow]) -> None:
    """Set layers that a line lacks to None, so that no other is taken for the last block."""
    for metric in ("tcs", "rho"):
        layers = _layers(layer_rows, metric)
        for row in rows:
            if metric in row["layerwise"]:
                row["layerwise"][metric] = dict.fromkeys(layers) | row["layerwise"][metric]


def _measured_signals(rows: Sequence[MetricsRow], depth: int) -> tuple[list[set[str]], set[str]]:
    """Return the signals available in each line, and those that any line measured itself."""
    measured: set[str] = set()
    for row in rows:
        measured |= read_signals(row, depth).measured
    return [read_signals(row, depth, measured).available for row in rows], measured


def _depth(config: Any, rows: Sequence[MetricsRow], notes: list[str]) -> int:
    """Return the depth that the configuration states, or the least that fits the layers."""
    depths = [config[n] for n in DEPTH_FIELDS if n in config] if isinstance(config, dict) else []
    if depths and isinstance(depths[0], int) and depths[0] > 0:
        return depths[0]
    layers = {int(k) for row in rows for table in row["layerwise"].values() for k in table}
    depth = max(layers, default=0) + 1
    notes.append(f"no configuration states the depth; {depth} is inferred from the layers")
    return depth


def _note_gaps(trace: Trace) -> None:
    pairs = list(zip(trace.steps, trace.steps[1:], strict=False))
    intervals = sorted(b - a for a, b in pairs)
    usual = intervals[int(0.9 * (len(intervals) - 1))] if intervals else 1  # not the densest part's
    gaps = [(a, b) for a, b in pairs if b - a > GAP * usual]
    for a, b in gaps[:5]:
        trace.notes.append(f"no line between steps {a} and {b}")
    if gaps[5:]:
        trace.notes.append(f"{len(gaps) - 5} more gaps")


def as_json(rows: Iterable[MetricsRow], depth: int) -> str:
    """Return the text of a trace file with lines of metrics; NaN and infinity become null."""
    scalars: dict[str, Any] = {}
    layerwise: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                _append(scalars, name, row["step"], value)
        for metric, table in row["layerwise"].items():
            for layer, value in table.items():
                _append(layerwise.setdefault(metric, {}), layer, row["step"], value)
    data = {"config": {"depth": depth}, "scalars": scalars, "layerwise": layerwise}
    return json.dumps(data, allow_nan=False) + "\n"


def _append(table: dict[str, Any], name: str, step: int, value: float | None) -> None:
    series = table.setdefault(name, {"s": [], "v": []})
    series["s"].append(step)
    known = value is not None and math.isfinite(value)
    series["v"].append(float(f"{value:.7g}") if known else None)
