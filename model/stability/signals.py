"""Signals that the collapse guard judges, read from lines of metrics.

A line of metrics has the integer `step`, scalars by name and `layerwise`, {metric: {layer: value}}
with layers as strings. It is one line of a run's metrics.jsonl.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

MetricsRow: TypeAlias = dict[str, Any]

SIGNALS = {
    "loss": "loss",
    "grad_norm": "raw gradient norm (grad_norm)",
    "tcs": "TCS of the last block (tcs)",
    "tcs_three_quarters": "TCS at three quarters of the depth (tcs)",
    "rho": "rho of the last block (rho)",
    "ratio": "G_mean / G_ctr of the writers (writer_G_mean, writer_G_ctr)",
    "centred": "G_ctr of the writers (writer_G_ctr)",
}


@dataclass(frozen=True)
class Signals:
    """Values of SIGNALS in one line of metrics, None where missing.

    substitutes  {signal: the quantity used in its place}
    """

    values: dict[str, float | None]
    substitutes: dict[str, str]

    @property
    def available(self) -> set[str]:
        return {name for name, value in self.values.items() if value is not None}

    @property
    def measured(self) -> set[str]:
        """The available signals that are not substitutes."""
        return self.available - self.substitutes.keys()


def read_signals(row: MetricsRow, depth: int, measured: Collection[str] = ()) -> Signals:
    """Return the signals in a line of metrics of a model with `depth` blocks.

    The deepest layer of the line counts as the last block. Of the other layers, the one nearest to
    0.75 depth is used for tcs_three_quarters. A missing TCS is replaced by rho^2 / (1 + rho^2),
    which it equals when all tokens have the same length, and a missing G_ctr by the gradient norm
    of W_Q.

    measured  signals that other lines measure; these are not replaced
    """
    substitutes = {}
    tcs, rho = (_by_layer(row, name) for name in ("tcs", "rho"))
    if not tcs and rho and "tcs" not in measured:
        tcs = {layer: _cosine(value) for layer, value in rho.items()}
        substitutes["tcs"] = "rho^2 / (1 + rho^2)"
    others = sorted(tcs)[:-1]
    G_mean, G_ctr = (_writer_total(row, f"writer_{part}") for part in ("G_mean", "G_ctr"))
    ratio = quotient(G_mean, G_ctr)
    values = {
        "loss": row.get("loss"),
        "grad_norm": row.get("grad_norm"),
        "tcs": tcs[max(tcs)] if tcs else None,
        "tcs_three_quarters": (
            tcs[min(others, key=lambda layer: abs(layer - 0.75 * depth))] if others else None
        ),
        "rho": rho[max(rho)] if rho else None,
        "ratio": row.get("writer_ratio") if ratio is None else ratio,
        "centred": G_ctr,
    }
    if G_ctr is None and "centred" not in measured:
        name = next((n for n in ("deep_Q", "global_Q") if is_number(row.get(n))), None)
        if name:
            values["centred"] = row[name]
            substitutes["centred"] = f"the gradient norm of W_Q ({name})"
    return Signals({name: _number(value) for name, value in values.items()}, substitutes)


def writer_totals(layerwise: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return writer_G_mean and writer_G_ctr: root of the sum of squares over layers and writers."""
    totals = {}
    for part in ("G_mean", "G_ctr"):
        names = (f"{part}_attention", f"{part}_ffn", f"writer_{part}", part)
        tables = (layerwise.get(name, {}) for name in names)
        values = [value for table in tables for value in table.values() if is_number(value)]
        if values:
            totals[f"writer_{part}"] = math.hypot(*values)
    return totals


def is_number(value: object) -> TypeGuard[float]:
    """Check that a value from a file is an integer or float and not NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def quotient(a: float | None, b: float | None) -> float | None:
    """Return a / b, infinity for b = 0; None if either is missing or both are 0."""
    if a is None or b is None or a == b == 0:
        return None
    return a / b if b else math.inf


def _number(value: object) -> float | None:
    return value if is_number(value) else None


def _by_layer(row: MetricsRow, metric: str) -> dict[float, float | None]:
    """Return {layer: value} of a metric, or {infinity: value} of one without layers."""
    table = row.get("layerwise", {}).get(metric)
    if table:
        return {int(layer): _number(value) for layer, value in table.items()}
    return {math.inf: _number(row[metric])} if metric in row else {}


def _writer_total(row: MetricsRow, name: str) -> float | None:
    value = _number(row.get(name))
    return writer_totals(row.get("layerwise", {})).get(name) if value is None else value


def _cosine(rho: float | None) -> float | None:
    if rho is None:
        return None
    return 1.0 if math.isinf(rho) else rho * rho / (1 + rho * rho)
