"""Plots of the report: numbers in, a matplotlib figure out; equal numbers give equal bytes."""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.typing import LegendLocType

WIDTH = 5.8  # inches: legible on a phone, which shows two thirds of it

# implementation: (name in legends, colour, marker)
SERIES_STYLES = {
    "floor": ("what must move", "#1c1c1c", "|"),
    "eager": ("eager", "#8d8d8d", "o"),
    "reference": ("reference (eager)", "#8d8d8d", "o"),
    "compile": ("torch.compile", "#5b9bc8", "s"),
    "fused": ("mvsplit_ops", "#d9622b", "D"),
    "cpu": ("mvsplit_ops, cpu", "#d9622b", "D"),
    "triton": ("mvsplit_ops, triton", "#e6a532", "^"),
    "cuda": ("mvsplit_ops, cuda", "#a3262a", "v"),
    "liger": ("Liger", "#4f9153", "P"),
    "quack": ("QuACK", "#7b5ea7", "X"),
    "published": ("published kernels", "#27496d", "*"),
}
OPERATOR_MARKERS = "osD^vPX*"
PART_COLOURS = (
    *("#27496d", "#5b9bc8", "#d9622b", "#e6a532"),
    *("#4f9153", "#7b5ea7", "#c9c9c9", "#8d8d8d"),
)
REFERENCE_LINE = {"color": "#222222", "linestyle": "--", "linewidth": 1}
RC_PARAMS: dict[Any, Any] = {
    "svg.hashsalt": "mvsplit-ops",  # equal figures give equal files
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
}
styled = matplotlib.rc_context(RC_PARAMS)  # decorates the functions that draw

Values = Mapping[str, Mapping[str, float]]  # {row: {implementation: value}}
Curves = dict[str, dict[str, list[tuple[float, float]]]]  # {operator: {implementation: points}}
Handle = Any  # of a legend: a line, or a container of bars
Line = tuple[float, str]  # position and label of a dashed line


def series_style(name: str) -> tuple[str, str, str]:
    return SERIES_STYLES.get(name, (name, "#444444", "h"))


def to_svg(figure: Figure, prefix: str) -> str:
    """Return an <svg> element for a page: no date, no other file, every id starts with `prefix`."""
    with matplotlib.rc_context({**RC_PARAMS, "svg.fonttype": "none"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', text, count=1)
    text = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]*)"', rf'href="#{prefix}-\1"', text)
    return text.strip()


@styled
def save_svg(figure: Figure, path: Path) -> None:
    """Write a file whose letters are outlines: it looks the same with any fonts."""
    figure.savefig(path, format="svg", metadata={"Date": None})


def _new_figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.05)
    figure = Figure(figsize=(WIDTH, height), layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _add_legend(
    figure: Figure, handles: Iterable[Handle], columns: int = 3, below: bool = False
) -> None:
    loc: LegendLocType = "outside lower left" if below else "outside upper left"
    figure.legend(handles=list(handles), loc=loc, ncols=columns)


@styled
def bars(
    panels: Mapping[str, Values], xlabel: str, line: Line | None = None, digits: int = 1
) -> Figure:
    """Draw {title of a panel: {row: {implementation: value}}} as groups of horizontal bars."""
    rows = [row for values in panels.values() for row in values.values()]
    height = 0.8 + 0.5 * len(panels) + 0.19 * sum(map(len, rows)) + 0.12 * len(rows)
    figure, axes = _new_figure(height, len(panels))
    handles: dict[str, Handle] = {}
    for axis, (title, values) in zip(axes[:, 0], panels.items(), strict=True):
        names = list(dict.fromkeys(name for row in values.values() for name in row))
        position, ticks = 0.0, []
        for row in values.values():
            ticks.append(position + (len(row) - 1) / 2)
            for name in (n for n in names if n in row):
                label, colour, _ = series_style(name)
                bar = axis.barh(position, row[name], 0.86, color=colour, label=label)
                axis.bar_label(bar, fmt=f"%.{digits}f", padding=3, fontsize=8)
                handles.setdefault(name, bar)
                position += 1
            position += 0.7
        axis.set_yticks(ticks, list(values))
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlim(left=0)
        if line:
            handles["line"] = axis.axvline(line[0], label=line[1], **REFERENCE_LINE)
        axis.set(title=title, xlabel=xlabel)
    _add_legend(figure, handles.values(), columns=2)
    return figure


@styled
def stacked(rows: Sequence[tuple[str, Mapping[str, float]]], xlabel: str) -> Figure:
    """Draw [(label, {part: value})] as bars of parts end to end, each with its sum."""
    figure, ((axis,),) = _new_figure(1.6 + 0.42 * len(rows))
    parts = dict.fromkeys(part for _, values in rows for part in values)
    colours = dict(zip(parts, PART_COLOURS, strict=False))
    handles: dict[str, Handle] = {}
    for y, (_, values) in enumerate(rows):
        left = 0.0
        for part, value in values.items():
            bar = axis.barh(y, value, 0.7, left=left, color=colours.get(part, "#444444"))
            bar.set_label(part)
            handles.setdefault(part, bar)
            left += value
        axis.annotate(f"{left:.4g}", (left, y), (3, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8.5)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel(xlabel)
    _add_legend(figure, handles.values())
    return figure


@styled
def roofline(
    points: Mapping[str, Mapping[str, tuple[float, float]]], roof: Line, xlabel: str, ylabel: str
) -> Figure:
    """Draw {operator: {implementation: (x, y)}}: operators by marker, implementations by colour.

    roof  the highest rate of the machine
    """
    figure, ((axis,),) = _new_figure(4.6)
    colours: dict[str, Handle] = {}
    markers: dict[str, Handle] = {}
    for marker, (operator, values) in zip(OPERATOR_MARKERS, points.items(), strict=False):
        for name, (x, y) in values.items():
            label, colour, _ = series_style(name)
            axis.plot(x, y, marker, color=colour, markersize=8, markeredgecolor="white")
            colours.setdefault(name, axis.plot([], [], "s", color=colour, label=label)[0])
        markers[operator] = axis.plot([], [], marker, color="#222222", label=operator)[0]
    line = axis.axhline(roof[0], label=roof[1], **REFERENCE_LINE)
    _scale_by_octaves(axis, [x for values in points.values() for x, _ in values.values()])
    axis.set_ylim(bottom=0)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(True)
    _add_legend(figure, [*colours.values(), line])
    _add_legend(figure, markers.values(), below=True)
    return figure


@styled
def curves(panels: Curves, xlabel: str, ylabel: str, roof: Line | None = None) -> Figure:
    """Draw {operator: {implementation: [(x, y)]}}: a panel per operator, x on a logarithmic axis.

    y is logarithmic too, unless there is a roof: it then starts at 0.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _new_figure(0.9 + 1.9 * rows, rows, columns)
    handles: dict[str, Handle] = {}
    for axis, (operator, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, points in lines.items():
            label, colour, marker = series_style(name)
            style = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.4}
            (line,) = axis.plot(*zip(*sorted(points), strict=True), label=label, **style)
            handles.setdefault(name, line)
        if roof:
            handles["roof"] = axis.axhline(roof[0], label=roof[1], **REFERENCE_LINE)
            axis.set_ylim(bottom=0)
        else:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=12))
            _write_plain_numbers(axis.yaxis)
        _scale_by_octaves(axis, [x for points in lines.values() for x, _ in points])
        axis.set_title(operator, fontsize=8.5)
        axis.grid(True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    _add_legend(figure, handles.values())
    return figure


@styled
def dots(rows: Sequence[tuple[str, float, Mapping[str, float]]], xlabel: str) -> Figure:
    """Draw [(label, floor, {implementation: value})]: dots on a logarithmic axis, a tick as floor.

    The dots of a row are shifted vertically, so that equal values do not cover each other.
    """
    names = list(dict.fromkeys(name for _, _, values in rows for name in values))
    figure, ((axis,),) = _new_figure(1.3 + 0.4 * len(rows))
    handles: dict[str, Handle] = {}
    for row, (_, floor, values) in enumerate(rows):
        for i, name in enumerate(names):
            if name in values:
                label, colour, marker = series_style(name)
                y = row + (i - (len(names) - 1) / 2) * 0.72 / len(names)
                (dot,) = axis.plot(values[name], y, marker, color=colour, label=label, markersize=5)
                handles.setdefault(name, dot)
        style = {"color": "#222222", "linewidth": 1.2, "zorder": 1, "label": "must move"}
        (tick,) = axis.plot([floor] * 2, [row - 0.42, row + 0.42], **style)
        axis.axhline(row + 0.5, color="#e6e6e6", linewidth=0.6)
    axis.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=8.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    _scale_by_octaves(axis, [v for _, floor, values in rows for v in (floor, *values.values())])
    axis.set_xlabel(xlabel)
    _add_legend(figure, [*handles.values(), tick])
    return figure


def _scale_by_octaves(axis: Axes, values: Sequence[float]) -> None:
    """Give a horizontal axis powers of two, from below the least value to above the largest."""
    low, high = math.log2(min(values)), math.log2(max(values))
    axis.set_xscale("log", base=2)
    axis.set_xlim(2 ** math.floor(low - 0.2), 2 ** math.ceil(high + 0.2))
    _write_plain_numbers(axis.xaxis)


def _write_plain_numbers(axis: Axis) -> None:
    """Label the ticks of a logarithmic axis with 0.01, not with a power of ten."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
