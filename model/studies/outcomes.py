"""Who collapses, and what the guard makes of it."""

import statistics

from model.config import CONTENDERS
from model.data import open_dataset
from model.demo import trivial_loss
from model.stability.guard import LOCK_LAST, LOCKED, TRIP, WATCH
from model.stability.trace import load, replay
from model.studies.base import Study, config_of, contenders
from model.train.runs import Job

LAST = 10  # steps at the end whose mean loss is told
LEARNED = 0.75  # of the loss of predicting nothing: a run that ends above it has not learned
ENDS = ("collapsed", "stalled", "trained")


class Controls(Study):
    """The paper's negative controls: hard centring, attention alone, clipping, LayerScale."""

    def jobs(self, blocks, seeds):
        post, layerscale, mvsplit = (CONTENDERS[n] for n in ("post", "layerscale", "mvsplit"))
        table = {
            "post": post,
            "post-default-init": {**post, "writer_init": "default"},
            **{f"post-clip-{c:g}": {**post, "clip": c} for c in (0, 0.1, 0.01)},
            "hard_center": {"residual": "hard_center", "writer_init": "zero"},
            "attention_only": {**mvsplit, "residual": "attention_only"},
            "attention_only-zero-init": {"residual": "attention_only", "writer_init": "zero"},
            "rezero": {"residual": "rezero", "writer_init": "default"},
            **{
                f"layerscale-{s:g}": {**layerscale, "init_scale": s}
                for s in (1e-2, 1e-3, 1e-4, 1e-5)
            },
            "mvsplit": mvsplit,
        }
        return {
            f"{name}-{n}-seed{seed}": Job(f"collapse{n}", {**changes, "seed": seed})
            for n in blocks
            for name, changes in table.items()
            for seed in range(seeds)
        }

    def summary(self, jobs, out):
        return {"rows": [{"run": n, **outcome(job, out / n)} for n, job in jobs.items()]}

    def conclusions(self, results):
        for end in ENDS:
            names = [row["run"] for row in results["rows"] if row["outcome"] == end]
            yield f"{end}: {', '.join(names) or 'none'}"


class Guarded(Controls):
    """Runs of three residuals, and how often the guard was right."""

    blocks, seeds = (100, 400), 3

    def jobs(self, blocks, seeds):
        return contenders(blocks, seeds)

    def summary(self, jobs, out):
        rows, counts = super().summary(jobs, out)["rows"], {}
        for end in ENDS:
            of = [row for row in rows if row["outcome"] == end]
            counts[end] = {"runs": len(of)}
            for state in ("watch", "trip", "locked", "lead"):
                counts[end][state] = sum(row[state] is not None for row in of)
        return {"rows": rows, "counts": counts}

    def conclusions(self, results):
        for end, n in results["counts"].items():
            yield (
                f"{n['runs']} {end}: LOCKED on {n['locked']} ({n['lead']} warned before), TRIP on "
                f"{n['trip']}, WATCH on {n['watch']}"
            )


def outcome(job, folder):
    """How a run ended, and what the guard found on the way.

    trained: its last loss is well below that of predicting nothing; collapsed: it is not, and the
    tokens of the last block are one; stalled: it is not, and they are not.
    """
    config = config_of(job)
    trace = load(folder)
    guard = replay(trace)
    losses = trace.series("loss")[1][-LAST:]
    loss, trivial = sum(losses) / len(losses), trivial_loss(open_dataset(config))
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
    centred, mean = (
        dict(zip(*trace.series(f"writer_{part}"), strict=True)) for part in ("G_ctr", "G_mean")
    )
    greatest, shares = 0.0, [1.0]
    for value in centred.values():
        greatest = max(greatest, value)
        shares.append(value / greatest if greatest else 1.0)
    ratios = [mean[step] / value for step, value in centred.items() if value and step in mean]
    return {
        "greatest_tcs": max(tcs, default=None), "least_centred": min(shares),
        "greatest_ratio": max(ratios, default=None),
    }  # fmt: skip
