"""Studies: small trainings side by side on the CPU, and what they show of the paper's claims.

amplification fits A - 1 against (T - 1) kappa (arXiv 2605.06169: R^2 above 0.9); controls tells who
locks; guard tells how often it finds a collapse, how early, and how often it is wrong.
"""

import json
import math
import statistics
from pathlib import Path

from rich.table import Table

from model import config as configuration
from model.config import CONTENDERS, UsageError
from model.data import open_dataset
from model.demo import trivial_loss
from model.guard import LOCK_LAST, LOCKED, TRIP, WATCH
from model.runs import Job, train_all
from model.taps import WRITERS
from model.trace import load, replay

IN_THE_NAME = ("blocks", "residual", "seed", "lr", "steps")  # of a run, and so not shown
LAST = 10  # steps at the end whose mean loss is told
LEARNED = 0.75  # of the loss of predicting nothing: a run that ends above it has not learned
KAPPAS = {"kappa": "(T - 1) kappa", "kappa_signed": "(T - 1) kappa with signs"}
PAPER_R2 = 0.9


def run(name, out=None, seeds=None, blocks=None, steps=None, show=lambda done, steps: None):
    """Run a study; returns its results and the files written: DIR/STUDY.json, perhaps STUDY.png.

    seeds, blocks, steps   of its trainings; None: the study's own
    show                   called as it goes with the steps done and all of them
    """
    trained, summarise, draw = STUDIES[name]
    out = out or Path("runs") / f"study-{name}"
    jobs = trained(seeds, blocks)
    if steps:
        jobs = {n: Job(j.preset, {**j.changes, "steps": steps}) for n, j in jobs.items()}
    total = sum(_config(job).steps for job in jobs.values())

    def count(lines):
        show(sum(rows[-1]["step"] for rows in lines.values() if rows), total)

    train_all(jobs, out, count)
    results = {"study": name, **summarise(jobs, out)}
    paths = [out / f"{name}.json"]
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    if draw:
        paths.append(out / f"{name}.png")
        draw(results, jobs, out, paths[-1])
    return results, paths


def _config(job):
    return configuration.preset(job.preset, **job.changes)


def _contenders(blocks, seeds):
    return {
        f"{residual}-{n}-seed{seed}": Job(f"collapse{n}", {**changes, "seed": seed})
        for n in blocks
        for seed in range(seeds)
        for residual, changes in CONTENDERS.items()
    }


# Amplification


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


def _amplification(jobs, folder):
    rows, pooled = [], {(w, k): [] for w in WRITERS for k in KAPPAS}
    traces = {name: load(folder / name) for name in jobs}
    for name, trace in traces.items():
        for writer, kappa in pooled:
            points = _points(trace, writer, kappa)
            pooled[writer, kappa] += points
            rows.append({"run": name, "writer": writer, "against": kappa, **fit(points)})
    for (writer, kappa), points in pooled.items():
        rows.append({"run": "all", "writer": writer, "against": kappa, **fit(points)})
    return {"paper_r2": PAPER_R2, "rows": rows}


def _draw_amplification(results, jobs, folder, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    traces = {name: load(folder / name) for name in jobs}
    figure, axes = plt.subplots(2, 2, figsize=(10, 9), layout="constrained")
    for axes_of, writer in zip(axes, WRITERS, strict=True):
        for axis, (kappa, title) in zip(axes_of, KAPPAS.items(), strict=True):
            for name, trace in traces.items():
                x, y = zip(*_points(trace, writer, kappa), strict=True)
                axis.scatter(x, y, s=4, alpha=0.5, label=name)
            (row,) = (
                r
                for r in results["rows"]
                if (r["run"], r["writer"], r["against"]) == ("all", writer, kappa)
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


# Who locks


def outcome(job, folder):
    """How a run ended, and what the guard found on the way.

    trained: its last loss is well below that of predicting nothing; collapsed: it is not, and the
    tokens of the last block are one; stalled: it is not, and they are not.
    """
    config = _config(job)
    trace = load(folder)
    guard = replay(trace)
    ends = [row["loss"] for row in trace.rows[-LAST:]]
    loss, trivial = sum(ends) / len(ends), trivial_loss(open_dataset(config))
    first = {state: guard.first[state][0] for state in guard.first}
    tcs = trace.series("tcs", trace.layers("tcs")[-1])[1]
    one = statistics.median(tcs[-LAST:]) > LOCK_LAST
    end = "trained" if loss < LEARNED * trivial else "collapsed" if one else "stalled"
    return {
        "blocks": config.depth, "residual": config.residual, "seed": config.seed, "lr": config.lr,
        "steps": trace.rows[-1]["step"], "loss": loss, "of_predicting_nothing": loss / trivial,
        "outcome": end,
        "watch": first.get(WATCH), "trip": first.get(TRIP), "locked": first.get(LOCKED),
        "lead": guard.lead(), **_margins(trace),
    }  # fmt: skip


def _margins(trace):
    """How near a run came to LOCKED: the greatest TCS, the least share of G_ctr, G_mean / G_ctr."""
    layers = trace.layers("tcs")
    tcs = trace.series("tcs", layers[-1])[1]
    centred, mean = (trace.series(f"writer_{part}")[1] for part in ("G_ctr", "G_mean"))
    greatest, shares = 0.0, []
    for value in centred:
        greatest = max(greatest, value)
        shares.append(value / greatest if greatest else 1.0)
    ratios = [m / c for m, c in zip(mean, centred, strict=True) if c]
    return {"greatest_tcs": max(tcs), "least_centred": min(shares), "greatest_ratio": max(ratios)}


def _outcomes(jobs, folder):
    return {"rows": [{"run": n, **outcome(job, folder / n)} for n, job in jobs.items()]}


def _verdicts(jobs, folder):
    """The outcomes, and how often the guard was right."""
    rows = _outcomes(jobs, folder)["rows"]
    counts = {}
    for end in ("collapsed", "stalled", "trained"):
        of = [row for row in rows if row["outcome"] == end]
        counts[end] = {"runs": len(of)}
        for state in ("watch", "trip", "locked", "lead"):
            counts[end][state] = sum(row[state] is not None for row in of)
    return {"rows": rows, "counts": counts}


def _controls(blocks, seeds):
    post, layerscale, mvsplit = (CONTENDERS[n] for n in ("post", "layerscale", "mvsplit"))
    table = {
        "post": post,
        "post-default-init": {**post, "writer_init": "default"},
        **{f"post-clip-{c:g}": {**post, "clip": c} for c in (0, 0.1, 0.01)},
        "hard_center": {"residual": "hard_center", "writer_init": "zero"},
        "attention_only": {**mvsplit, "residual": "attention_only"},
        "attention_only-zero-init": {"residual": "attention_only", "writer_init": "zero"},
        "rezero": {"residual": "rezero", "writer_init": "default"},
        **{f"layerscale-{s:g}": {**layerscale, "init_scale": s} for s in (1e-2, 1e-3, 1e-4, 1e-5)},
        "mvsplit": mvsplit,
    }
    return {
        f"{name}-{n}-seed{seed}": Job(f"collapse{n}", {**changes, "seed": seed})
        for n in blocks
        for name, changes in table.items()
        for seed in range(seeds)
    }


# name: (the jobs of seeds and blocks, what is made of them, what is drawn of that)
STUDIES = {
    "amplification": (
        lambda seeds, blocks: _contenders(blocks or (100,), seeds or 1),
        _amplification,
        _draw_amplification,
    ),
    "controls": (lambda seeds, blocks: _controls(blocks or (100,), seeds or 1), _outcomes, None),
    "guard": (
        lambda seeds, blocks: _contenders(blocks or (100, 400), seeds or 3),
        _verdicts,
        None,
    ),
}


def table(results):
    """The rows of a study as a table for the terminal."""
    view = Table()
    shown = [name for name in results["rows"][0] if name not in IN_THE_NAME]
    for name in shown:
        words = isinstance(results["rows"][0][name], str)
        view.add_column(name.replace("_", " "), justify="left" if words else "right")
    for row in results["rows"]:
        view.add_row(*(_cell(row[name]) for name in shown))
    return view


def _cell(value):
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def conclusions(results):
    """What a study found, a sentence each."""
    if results["study"] == "amplification":
        for row in results["rows"]:
            if row["run"] == "all":
                yield (
                    f"{row['writer']}: A - 1 = {row['slope']:.3f} {KAPPAS[row['against']]}, R^2 "
                    f"{row['r2']:.3f} over {row['points']} points (the paper: above {PAPER_R2})"
                )
    elif results["study"] == "guard":
        for end, n in results["counts"].items():
            yield (
                f"{n['runs']} {end}: LOCKED on {n['locked']} ({n['lead']} warned before), TRIP on "
                f"{n['trip']}, WATCH on {n['watch']}"
            )
    else:
        locked = [row["run"] for row in results["rows"] if row["locked"] is not None]
        yield f"LOCKED: {', '.join(locked) or 'none'}"
