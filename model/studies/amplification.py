"""Study of the paper's law: a writer's gradient is amplified in proportion to token coherence.

A - 1 = sum_{i != j} <d_i, d_j> <h_i, h_j> / sum_t |d_t|^2 |h_t|^2. If all tokens have the same
length, this is (T - 1) kappa with signed cosines; kappa, of absolute cosines, is an upper bound.
arXiv 2605.06169 reports R^2 above 0.9.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.config import UsageError
from model.stability.metrics import WRITERS
from model.stability.trace import Trace, load_trace
from model.studies.base import Jobs, Results, Study, contender_jobs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KAPPAS = {"kappa": "(T - 1) kappa", "kappa_signed": "(T - 1) kappa with signs"}
PAPER_R2 = 0.9
ALL_RUNS = "all"  # name of the rows that pool the points of all runs

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Fit:
    """Line through the origin, fitted to points by least squares.

    r2         1 - residual / variance of the line; negative if it is worse than the mean
    r2_affine  R^2 of a line with an intercept
    """

    points: int
    slope: float
    r2: float
    r2_affine: float


class Amplification(Study):
    """Regression of A - 1 on (T - 1) kappa over the lines and layers of all contenders."""

    def jobs(self, blocks: Sequence[int], seeds: int) -> Jobs:
        return contender_jobs(blocks, seeds)

    def summarize(self, jobs: Jobs, out: Path) -> Results:
        rows, pooled = [], {(w, k): Points() for w in WRITERS for k in KAPPAS}

        def add_row(run: str, writer: str, kappa: str, points: Points) -> None:
            fit = dataclasses.asdict(fit_line(points))
            rows.append({"run": run, "writer": writer, "against": kappa, **fit})

        for name, trace in _load_traces(jobs, out).items():
            for writer, kappa in pooled:
                points = _points(trace, writer, kappa)
                pooled[writer, kappa] += points
                add_row(name, writer, kappa, points)
        for (writer, kappa), points in pooled.items():
            add_row(ALL_RUNS, writer, kappa, points)
        return {"paper_r2": PAPER_R2, "rows": rows}

    def conclusions(self, results: Results) -> Iterator[str]:
        for row in results["rows"]:
            if row["run"] == ALL_RUNS:
                yield (
                    f"{row['writer']}: A - 1 = {row['slope']:.3f} {KAPPAS[row['against']]}, R^2 "
                    f"{row['r2']:.3f} over {row['points']} points (the paper: above {PAPER_R2})"
                )

    def draw(self, results: Results, out: Path, path: Path) -> bool:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        names = dict.fromkeys(row["run"] for row in results["rows"] if row["run"] != ALL_RUNS)
        traces = _load_traces(names, out)
        fits = {(r["writer"], r["against"]): r for r in results["rows"] if r["run"] == ALL_RUNS}
        figure, axes = plt.subplots(2, 2, figsize=(10, 9), layout="constrained")
        for (writer, kappa), axis in zip(fits, axes.flat, strict=True):
            for name, trace in traces.items():
                x, y = zip(*_points(trace, writer, kappa), strict=True)
                axis.scatter(x, y, s=4, alpha=0.5, label=name)
            _draw_fit(axis, writer, kappa, fits[writer, kappa])
        axes[0, 0].legend(fontsize=7, markerscale=3)
        figure.suptitle("Amplification of a writer's gradient against the coherence of its tokens")
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return True


def _draw_fit(axis: Axes, writer: str, kappa: str, fit: dict[str, float]) -> None:
    right = max(axis.get_xlim())
    axis.plot([0, right], [0, fit["slope"] * right], color="black", linewidth=1)
    axis.set(
        xlabel=KAPPAS[kappa], ylabel="A - 1",
        title=f"{writer}: slope {fit['slope']:.2f}, R² {fit['r2']:.3f}",
    )  # fmt: skip
    axis.grid(alpha=0.3)


def _load_traces(names: Iterable[str], out: Path) -> dict[str, Trace]:
    return {name: load_trace(out / name) for name in names}


def _points(trace: Trace, writer: str, kappa: str) -> Points:
    """Return (kappa, A - 1) of every line and measured layer."""
    points = []
    for row in trace.rows:
        for layer, A in row["layerwise"].get(f"A_{writer}", {}).items():
            coherence = row["layerwise"][f"{kappa}_{writer}"].get(layer)
            if A is not None and coherence is not None:
                points.append((coherence, A - 1))
    return points


def fit_line(points: Points) -> Fit:
    """Fit a line through the origin to points (x, y)."""
    n = len(points)
    if n < 2:
        raise UsageError("study amplification: no points to fit; train more steps with probes=true")
    mean_x, mean_y = (math.fsum(p[i] for p in points) / n for i in (0, 1))
    xx, xy = (math.fsum(p[0] * p[i] for p in points) for i in (0, 1))
    sxx = math.fsum((x - mean_x) ** 2 for x, _ in points)
    syy = math.fsum((y - mean_y) ** 2 for _, y in points)
    sxy = math.fsum((x - mean_x) * (y - mean_y) for x, y in points)
    slope = xy / xx
    residual = math.fsum((y - slope * x) ** 2 for x, y in points)
    return Fit(n, slope, 1 - residual / syy, sxy**2 / (sxx * syy))
