"""The picture of a trace: how a run entered its token mean, or did not."""

import math
from pathlib import Path

from model.stability.guard import LOCKED, TRIP, WATCH

MARKS = {WATCH: "#e6a532", TRIP: "#d9622b", LOCKED: "#a3262a"}
INK = ("#27496d", "#5b9bc8", "#4f9153", "#7b5ea7", "#d9622b", "#8d8d8d")
NEAR = 0.6  # of the whole trace: an event that long needs no view of its own
MARGIN = 20  # lines on each side of the event in the close view


def mean_mode_screaming(trace, guard, path):
    """Loss and gradient norm, writer modes, Q and K, rho, and TCS over depth and steps, as PNG.

    Where the guard found anything a second column shows those steps from near.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    views = _views(trace, guard)
    panels = (_loss, _writers, _queries_keys, _rho, _tcs)
    heights = [1, 1, 1, 1, 1.4]
    figure, axes = plt.subplots(
        len(panels), len(views), figsize=(6.2 * len(views) + 1, 12), squeeze=False,
        layout="constrained", sharex="col", height_ratios=heights,
    )  # fmt: skip
    for column, (title, limits) in enumerate(views):
        for panel, axis in zip(panels, axes[:, column], strict=True):
            panel(figure, axis, trace, limits)
            for state, (step, _) in guard.first.items():
                if limits[0] <= step <= limits[1]:
                    axis.axvline(
                        step, color=MARKS[state], linewidth=1.2, linestyle="--", label=state
                    )
            axis.set_xlim(*limits)
            handles, labels = axis.get_legend_handles_labels()
            if labels and panel is not _tcs:
                unique = dict(zip(labels, handles, strict=True))
                axis.legend(unique.values(), unique.keys(), fontsize=7, loc="best")
        axes[0, column].set_title(title, fontsize=10)
        axes[-1, column].set_xlabel("optimizer step")
    found = ", ".join(f"{state} at step {step}" for state, (step, _) in guard.first.items())
    path_of = Path(trace.title)
    source = Path(path_of.parent.name) / path_of.name
    figure.suptitle(f"{source}, {trace.depth} blocks: {found or 'nothing found'}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _views(trace, guard):
    """[(title, (first step, last step))]: the whole trace, and the event."""
    steps = trace.steps
    whole = (steps[0], max(steps[-1], steps[0] + 1))
    grave = [guard.first[s][0] for s in (TRIP, LOCKED) if s in guard.first]
    if not grave:
        return [("the whole trace", whole)]
    first, last = (
        min(range(len(steps)), key=lambda i: abs(steps[i] - s)) for s in (min(grave), max(grave))
    )
    near = steps[max(0, first - MARGIN)], steps[min(len(steps) - 1, last + MARGIN)]
    if not 0 < near[1] - near[0] <= NEAR * (whole[1] - whole[0]):
        return [("the whole trace", whole)]
    return [("the whole trace", whole), ("the event", near)]


def _line(axis, trace, metric, layer=None, **how):
    steps, values = trace.series(metric, layer)
    if steps:
        axis.plot(
            steps,
            values,
            marker="." if len(steps) < 80 else None,
            markersize=3,
            linewidth=1.2,
            **how,
        )
    return bool(steps)


def _or_absent(axis, drawn, what):
    if not drawn:
        axis.text(0.5, 0.5, f"{what}: not in the trace", ha="center", va="center",
                  transform=axis.transAxes, color="#8d8d8d")  # fmt: skip
    axis.grid(alpha=0.3)


def _loss(figure, axis, trace, limits):
    drawn = _line(axis, trace, "loss", color=INK[0], label="loss")
    axis.set_ylabel("loss")
    other = axis.twinx()
    norm = _line(other, trace, "grad_norm", color=INK[4], alpha=0.8, label="gradient norm, raw")
    if norm:
        other.set_yscale("log")
        other.set_ylabel("gradient norm", color=INK[4])
    else:
        other.set_yticks([])
    _or_absent(axis, drawn or norm, "loss and gradient norm")


def _writers(figure, axis, trace, limits):
    drawn = [
        _line(axis, trace, f"writer_{part}", color=ink, label=label)
        for part, ink, label in (("G_mean", INK[4], "G_mean"), ("G_ctr", INK[0], "G_ctr"))
    ]
    _logarithmic(axis, any(drawn))
    axis.set_ylabel("|gradient of W_O, W_2|")
    _or_absent(axis, any(drawn), "writer modes")


def _queries_keys(figure, axis, trace, limits):
    labels = {"global": "all blocks", "deep": "last quarter"}
    drawn = [
        _line(axis, trace, f"{part}_{role}", color=INK[2 * (role == "K") + (part == "deep")],
              label=f"W_{role}, {labels[part]}")
        for role in "QK" for part in labels
    ]  # fmt: skip
    _logarithmic(axis, any(drawn))
    axis.set_ylabel("|gradient of W_Q, W_K|")
    _or_absent(axis, any(drawn), "Q and K gradients")


def _rho(figure, axis, trace, limits):
    layers = trace.layers("rho")
    shown = (
        layers if len(layers) <= 4 else [layers[round(i * (len(layers) - 1) / 3)] for i in range(4)]
    )
    drawn = [
        _line(axis, trace, "rho", k, color=c, label=f"block {k}")
        for k, c in zip(shown, INK, strict=False)
    ]
    drawn.append(_line(axis, trace, "rho", color=INK[0], label="rho"))
    _logarithmic(axis, any(drawn))
    axis.set_ylabel("rho = |JX| / |PX|")
    _or_absent(axis, any(drawn), "rho")


def _logarithmic(axis, drawn):
    if drawn and any((line.get_ydata() > 0).any() for line in axis.lines):
        axis.set_yscale("log")


def _tcs(figure, axis, trace, limits):
    """A heat map: a row for each layer that was tapped, a column for each step."""
    layers = trace.layers("tcs")
    if not layers:
        drawn = _line(axis, trace, "tcs", color=INK[0], label="TCS")
        axis.set_ylabel("TCS")
        return _or_absent(axis, drawn, "TCS")
    rows = [row for row in trace.rows if limits[0] <= row["step"] <= limits[1]]
    table = [[_value(row, layer) for row in rows] for layer in layers]
    steps = [row["step"] for row in rows]
    mesh = axis.pcolormesh(
        _edges(steps), range(len(layers) + 1), table, cmap="magma", vmin=0, vmax=1, rasterized=True
    )
    shown = range(0, len(layers), max(1, len(layers) // 9))
    axis.set_yticks([i + 0.5 for i in shown], [layers[i] for i in shown])
    axis.set_ylabel("block")
    figure.colorbar(mesh, ax=axis, label="TCS", pad=0.01)


def _value(row, layer):
    value = row["layerwise"].get("tcs", {}).get(layer)
    return math.nan if value is None else value


def _edges(steps):
    """The borders of cells around steps."""
    if len(steps) < 2:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middle = [(a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)]
    return [2 * steps[0] - middle[0], *middle, 2 * steps[-1] - middle[-1]]
