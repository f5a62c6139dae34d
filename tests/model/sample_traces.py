"""Lines and traces of a run that is healthy, then collapses; imported by the tests of both."""

import json
import math
import random

DEPTH = 100
HEALTHY = dict(loss=0.8, grad_norm=0.1, rho=0.9, tcs=0.5, shallow=0.3, G_mean=0.001, G_ctr=0.003)


def line(step, noise=None, **changes):
    """A line of metrics; noise shakes every value by some percent."""
    v = {**HEALTHY, **changes}
    if noise:
        v = {k: x * math.exp(0.03 * noise.gauss(0, 1)) for k, x in v.items()}
    return {
        "step": step, "loss": v["loss"], "grad_norm": v["grad_norm"],
        "writer_G_mean": v["G_mean"], "writer_G_ctr": v["G_ctr"],
        "layerwise": {
            "tcs": {"75": v["shallow"], "99": v["tcs"]}, "rho": {"75": v["rho"], "99": v["rho"]},
        },
    }  # fmt: skip


COLLAPSING = dict(tcs=0.97, shallow=0.9, rho=5.0, G_mean=0.1, G_ctr=0.002, grad_norm=8.0, loss=1.8)
COLLAPSED = dict(tcs=1.0, shallow=0.99, rho=400.0, G_mean=0.2, G_ctr=1e-5, grad_norm=3.0, loss=1.9)


def trace(folder, rows, **config):
    """A trace file of lines, written by hand as the format says."""
    scalars, layerwise = {}, {}
    for row in rows:
        for name in ("loss", "grad_norm", "writer_G_mean", "writer_G_ctr"):
            add(scalars, name, row["step"], row[name])
        for metric, table in row["layerwise"].items():
            for layer, value in table.items():
                add(layerwise.setdefault(metric, {}), layer, row["step"], value)
    path = folder / "trace.json"
    data = {"config": {"depth": DEPTH, **config}, "scalars": scalars, "layerwise": layerwise}
    path.write_text(json.dumps(data))
    return path


def add(table, name, step, value):
    series = table.setdefault(name, {"s": [], "v": []})
    series["s"].append(step)
    series["v"].append(value)


def collapse(steps=120, every=1, onset=80):
    noise, rows = random.Random(3), []
    for n in range(1, steps * every, every):
        changes = {} if n < onset * every else COLLAPSING if n < (onset + 3) * every else COLLAPSED
        rows.append(line(n, noise if n < onset * every else None, **changes))
    return rows
