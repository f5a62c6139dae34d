"""Artificial lines and traces of a run that is healthy and then collapses."""

import json
import math
import random

DEPTH = 100
HEALTHY = dict(loss=0.8, grad_norm=0.1, rho=0.9, tcs=0.5, shallow=0.3, G_mean=0.001, G_ctr=0.003)


def line(step, noise=None, **changes):
    """Return a line of metrics; a random.Random as `noise` changes every value by some percent."""
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


def write_trace(folder, rows, **config):
    """Write lines as a trace file, independently of trace.as_json; return its path."""
    scalars, layerwise = {}, {}
    for row in rows:
        for name in ("loss", "grad_norm", "writer_G_mean", "writer_G_ctr"):
            add_sample(scalars, name, row["step"], row[name])
        for metric, table in row["layerwise"].items():
            for layer, value in table.items():
                add_sample(layerwise.setdefault(metric, {}), layer, row["step"], value)
    path = folder / "trace.json"
    data = {"config": {"depth": DEPTH, **config}, "scalars": scalars, "layerwise": layerwise}
    path.write_text(json.dumps(data))
    return path


def add_sample(table, name, step, value):
    series = table.setdefault(name, {"s": [], "v": []})
    series["s"].append(step)
    series["v"].append(value)


def collapsing_rows(steps=120, every=1, onset=80):
    """Return lines at every `every`-th step that collapse in the `onset`-th line."""
    noise, rows = random.Random(3), []
    for n in range(1, steps * every, every):
        changes = {} if n < onset * every else COLLAPSING if n < (onset + 3) * every else COLLAPSED
        rows.append(line(n, noise if n < onset * every else None, **changes))
    return rows
