"""The paper's law: the gradient of a writer is amplified as its tokens are coherent.

A - 1 = sum_{i != j} <d_i, d_j> <h_i, h_j> / sum_t |d_t|^2 |h_t|^2. Where all tokens are of one
length that is (T - 1) kappa with the cosines' signs; kappa, of absolute cosines, bounds it.
arXiv 2605.06169 reports R^2 above 0.9.
"""

import math

from model.config import UsageError
from model.stability.metrics import WRITERS
from model.stability.trace import load
from model.studies.base import Study, contenders

KAPPAS = {"kappa": "(T - 1) kappa", "kappa_signed": "(T - 1) kappa with signs"}
PAPER_R2 = 0.9
ALL = "all"


class Amplification(Study):
    def jobs(self, blocks, seeds):
        return contenders(blocks, seeds)

    def summary(self, jobs, out):
        rows, pooled = [], {(w, k): [] for w in WRITERS for k in KAPPAS}
        traces = {name: load(out / name) for name in jobs}
        for name, trace in traces.items():
            for writer, kappa in pooled:
                points = _points(trace, writer, kappa)
                pooled[writer, kappa] += points
                rows.append({"run": name, "writer": writer, "against": kappa, **fit(points)})
        for (writer, kappa), points in pooled.items():
            rows.append({"run": ALL, "writer": writer, "against": kappa, **fit(points)})
        return {"paper_r2": PAPER_R2, "rows": rows}

    def conclusions(self, results):
        for row in results["rows"]:
            if row["run"] == ALL:
                yield (
                    f"{row['writer']}: A - 1 = {row['slope']:.3f} {KAPPAS[row['against']]}, R^2 "
                    f"{row['r2']:.3f} over {row['points']} points (the paper: above {PAPER_R2})"
                )

    def draw(self, results, out, path):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        names = dict.fromkeys(row["run"] for row in results["rows"] if row["run"] != ALL)
        traces = {name: load(out / name) for name in names}
        figure, axes = plt.subplots(2, 2, figsize=(10, 9), layout="constrained")
        for axes_of, writer in zip(axes, WRITERS, strict=True):
            for axis, (kappa, title) in zip(axes_of, KAPPAS.items(), strict=True):
                for name, trace in traces.items():
                    x, y = zip(*_points(trace, writer, kappa), strict=True)
                    axis.scatter(x, y, s=4, alpha=0.5, label=name)
                (row,) = (
                    r
                    for r in results["rows"]
                    if (r["run"], r["writer"], r["against"]) == (ALL, writer, kappa)
                )
                right = max(axis.get_xlim())
                axis.plot([0, right], [0, row["slope"] * right], color="black", linewidth=1)
                axis.set(
                    xlabel=title, ylabel="A - 1",
                    title=f"{writer}: slope {row['slope']:.2f}, R² {row['r2']:.3f}",
                )  # fmt: skip
                axis.grid(alpha=0.3)
        axes[0, 0].legend(fontsize=7, markerscale=3)
        figure.suptitle("Amplification of a writer's gradient against the coherence of its tokens")
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return True


def _points(trace, writer, kappa):
    """(x, y) of every line and tapped layer: a kappa and A - 1."""
    points = []
    for row in trace.rows:
        for layer, A in row["layerwise"].get(f"A_{writer}", {}).items():
            coherence = row["layerwise"][f"{kappa}_{writer}"].get(layer)
            if A is not None and coherence is not None:
                points.append((coherence, A - 1))
    return points


def fit(points):
    """Slope through the origin, R^2 of that line, R^2 of a line with an intercept; n points.

    R^2 is 1 - residual / variance, so a line through the origin may have less than nothing.
    """
    n = len(points)
    if n < 2:
        raise UsageError("no points to fit; train with probes and more steps")
    mean_x, mean_y = (math.fsum(p[i] for p in points) / n for i in (0, 1))
    xx, xy = (math.fsum(p[0] * p[i] for p in points) for i in (0, 1))
    sxx = math.fsum((x - mean_x) ** 2 for x, _ in points)
    syy = math.fsum((y - mean_y) ** 2 for _, y in points)
    sxy = math.fsum((x - mean_x) * (y - mean_y) for x, y in points)
    slope = xy / xx
    residual = math.fsum((y - slope * x) ** 2 for x, y in points)
    return {
        "points": n,
        "slope": slope,
        "r2": 1 - residual / syy,
        "r2_affine": sxy**2 / (sxx * syy),
    }
