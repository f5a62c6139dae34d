"""Figure of a trace, which shows whether and how a run collapsed into its token mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.stability.guard import LOCKED, TRIP, WATCH, Guard
from model.stability.signals import MetricsRow, is_number
from model.stability.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATE_COLOURS = {WATCH: "#e6a532", TRIP: "#d9622b", LOCKED: "#a3262a"}
LINE_COLOURS = ("#27496d", "#5b9bc8", "#4f9153", "#7b5ea7", "#d9622b", "#8d8d8d")
CLOSE_VIEW_SHARE = 0.6  # of the trace: an event that covers more has no view of its own
CLOSE_VIEW_MARGIN = 20  # lines before and after the event in the close view


def draw_trace(trace: Trace, guard: Guard, path: Path) -> None:
    """Write a PNG of loss, gradient norms, writer modes, rho, and TCS over depth and steps.

    After a TRIP or LOCKED, a second column shows the steps around it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    views = _views(trace, guard)
    panels = (_draw_loss, _draw_writers, _draw_queries_keys, _draw_rho, _draw_tcs)
    figure, axes = plt.subplots(
        len(panels), len(views), figsize=(6.2 * len(views) + 1, 12), squeeze=False,
        layout="constrained", sharex="col", height_ratios=[1, 1, 1, 1, 1.4],
    )  # fmt: skip
    for column, (title, limits) in enumerate(views):
        for panel, axis in zip(panels, axes[:, column], strict=True):
            panel(figure, axis, trace, limits)
            for state, (step, _) in guard.first.items():
                if limits[0] <= step <= limits[1]:
                    axis.axvline(
                        step,
                        color=STATE_COLOURS[state],
                        linewidth=1.2,
                        linestyle="--",
                        label=state,
                    )
            axis.set_xlim(*limits)
            handles, labels = axis.get_legend_handles_labels()
            if labels and panel is not _draw_tcs:
                unique = dict(zip(labels, handles, strict=True))
                axis.legend(unique.values(), unique.keys(), fontsize=7, loc="best")
        axes[0, column].set_title(title, fontsize=10)
        axes[-1, column].set_xlabel("optimizer step")
    states = ", ".join(f"{state} at step {step}" for state, (step, _) in guard.first.items())
    source = Path(trace.title)
    title = f"{Path(source.parent.name) / source.name}, {trace.depth} blocks"
    figure.suptitle(f"{title}: {states or 'nothing detected'}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _views(trace: Trace, guard: Guard) -> list[tuple[str, tuple[int, int]]]:
    """Return (title, (first step, last step)) of the whole trace and of an event, if any."""
    steps = trace.steps
    whole = (steps[0], max(steps[-1], steps[0] + 1))
    views = [("the whole trace", whole)]
    events = [guard.first[s].step for s in (TRIP, LOCKED) if s in guard.first]
    if not events:
        return views
    first, last = (
        min(range(len(steps)), key=lambda i: abs(steps[i] - s)) for s in (min(events), max(events))
    )
    close = (
        steps[max(0, first - CLOSE_VIEW_MARGIN)],
        steps[min(len(steps) - 1, last + CLOSE_VIEW_MARGIN)],
    )
    if 0 < close[1] - close[0] <= CLOSE_VIEW_SHARE * (whole[1] - whole[0]):
        views.append(("the event", close))
    return views


def _draw_line(
    axis: Axes, trace: Trace, metric: str, layer: str | None = None, **style: Any
) -> bool:
    """Draw a series; return whether the trace has it."""
    steps, values = trace.series(metric, layer)
    if steps:
        axis.plot(
            steps,
            values,
            marker="." if len(steps) < 80 else None,
            markersize=3,
            linewidth=1.2,
            **style,
        )
    return bool(steps)


def _finish_panel(axis: Axes, drawn: bool, content: str) -> None:
    """Draw the grid, and a note where the trace has nothing to draw."""
    if not drawn:
        axis.text(0.5, 0.5, f"{content}: not in the trace", ha="center", va="center",
                  transform=axis.transAxes, color="#8d8d8d")  # fmt: skip
    axis.grid(alpha=0.3)


def _draw_loss(figure: Figure, axis: Axes, trace: Trace, limits: tuple[int, int]) -> None:
    drawn = _draw_line(axis, trace, "loss", color=LINE_COLOURS[0], label="loss")
    axis.set_ylabel("loss")
    other = axis.twinx()
    norm = _draw_line(
        other, trace, "grad_norm", color=LINE_COLOURS[4], alpha=0.8, label="gradient norm, raw"
    )
    if norm:
        other.set_yscale("log")
        other.set_ylabel("gradient norm", color=LINE_COLOURS[4])
    else:
        other.set_yticks([])
    _finish_panel(axis, drawn or norm, "loss and gradient norm")


def _draw_writers(figure: Figure, axis: Axes, trace: Trace, limits: tuple[int, int]) -> None:
    drawn = [
        _draw_line(axis, trace, f"writer_{part}", color=colour, label=part)
        for part, colour in (("G_mean", LINE_COLOURS[4]), ("G_ctr", LINE_COLOURS[0]))
    ]
    _set_log_scale(axis, any(drawn))
    axis.set_ylabel("|gradient of W_O, W_2|")
    _finish_panel(axis, any(drawn), "writer modes")


def _draw_queries_keys(figure: Figure, axis: Axes, trace: Trace, limits: tuple[int, int]) -> None:
    parts = (("global", "all blocks"), ("deep", "last quarter"))
    series = [(role, part, blocks) for role in "QK" for part, blocks in parts]
    drawn = [
        _draw_line(axis, trace, f"{part}_{role}", color=colour, label=f"W_{role}, {blocks}")
        for (role, part, blocks), colour in zip(series, LINE_COLOURS, strict=False)
    ]
    _set_log_scale(axis, any(drawn))
    axis.set_ylabel("|gradient of W_Q, W_K|")
    _finish_panel(axis, any(drawn), "Q and K gradients")


def _draw_rho(figure: Figure, axis: Axes, trace: Trace, limits: tuple[int, int]) -> None:
    layers = trace.layers("rho")
    shown = (
        layers if len(layers) <= 4 else [layers[round(i * (len(layers) - 1) / 3)] for i in range(4)]
    )
    drawn = [
        _draw_line(axis, trace, "rho", k, color=c, label=f"block {k}")
        for k, c in zip(shown, LINE_COLOURS, strict=False)
    ]
    drawn.append(_draw_line(axis, trace, "rho", color=LINE_COLOURS[0], label="rho"))
    _set_log_scale(axis, any(drawn))
    axis.set_ylabel("rho = |JX| / |PX|")
    _finish_panel(axis, any(drawn), "rho")


def _set_log_scale(axis: Axes, drawn: bool) -> None:
    if drawn and any((np.asarray(line.get_ydata()) > 0).any() for line in axis.lines):
        axis.set_yscale("log")


def _draw_tcs(figure: Figure, axis: Axes, trace: Trace, limits: tuple[int, int]) -> None:
    """Draw a heat map with one row per measured layer and one column per step."""
    layers = trace.layers("tcs")
    if not layers:
        drawn = _draw_line(axis, trace, "tcs", color=LINE_COLOURS[0], label="TCS")
        axis.set_ylabel("TCS")
        _finish_panel(axis, drawn, "TCS")
        return
    rows = [row for row in trace.rows if limits[0] <= row["step"] <= limits[1]]
    table = [[_tcs_of(row, layer) for row in rows] for layer in layers]
    steps = [row["step"] for row in rows]
    mesh = axis.pcolormesh(
        _cell_edges(steps),
        range(len(layers) + 1),
        table,
        cmap="magma",
        vmin=0,
        vmax=1,
        rasterized=True,
    )
    shown = range(0, len(layers), max(1, len(layers) // 9))
    axis.set_yticks([i + 0.5 for i in shown], [layers[i] for i in shown])
    axis.set_ylabel("block")
    figure.colorbar(mesh, ax=axis, label="TCS", pad=0.01)


def _tcs_of(row: MetricsRow, layer: str) -> float:
    value = row["layerwise"].get("tcs", {}).get(layer)
    return value if is_number(value) else math.nan


def _cell_edges(steps: Sequence[int]) -> list[float]:
    """Return the borders of heat map cells centred at steps."""
    if len(steps) < 2:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middle = [(a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)]
    return [2 * steps[0] - middle[0], *middle, 2 * steps[-1] - middle[-1]]
