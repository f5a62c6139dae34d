"""Plots of what was measured: numbers in, a figure out, the same numbers the same bytes.

svg() makes of a figure an element that stands in a page: no date, no outer file, ids of its own.
"""

import io
import math
import re
from functools import wraps

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

WIDTH = 5.8  # inches: a phone shows them at two thirds, letters still legible

# implementation: (name in legends, colour, marker)
LOOK = {
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
    "#27496d",
    "#5b9bc8",
    "#d9622b",
    "#e6a532",
    "#4f9153",
    "#7b5ea7",
    "#c9c9c9",
    "#8d8d8d",
)
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")  # 0.01, not a power of ten
STYLE = {
    "svg.hashsalt": "mvsplit-ops",  # the same picture gives the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
}


def look(name):
    return LOOK.get(name, (name, "#444444", "h"))


def svg(figure, name):
    """An <svg> element for a page; every id in it begins with `name`."""
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', text, count=1)
    text = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]*)"', rf'href="#{name}-\1"', text)
    return text.strip()


def _figure(height, rows=1, columns=1, **kwargs):
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.05)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _legend(figure, handles, where="outside upper left", columns=3):
    figure.legend(handles=handles, loc=where, ncols=columns, fontsize=8.5)


def styled(draw):
    """A function that draws, with the settings of all pictures."""

    @wraps(draw)
    def drawn(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


@styled
def bars(values, xlabel, line=None, fmt="%.1f"):
    """{row: {implementation: value}} as bars to the right; line = (x, label) stands across them."""
    names = list(dict.fromkeys(name for row in values.values() for name in row))
    count = sum(len(row) for row in values.values())
    figure, ((axis,),) = _figure(1.3 + 0.19 * count + 0.12 * len(values))
    at, ticks, handles = 0.0, [], {}
    for row in values.values():
        ticks.append(at + (len(row) - 1) / 2)
        for name in [n for n in names if n in row]:
            label, colour, _ = look(name)
            bar = axis.barh(at, row[name], 0.86, color=colour, label=label)
            axis.bar_label(bar, fmt=fmt, padding=3, fontsize=8)
            handles.setdefault(name, bar)
            at += 1
        at += 0.7
    if line:
        x, label = line
        handles["line"] = axis.axvline(x, color="#222222", linestyle="--", linewidth=1, label=label)
    axis.set_yticks(ticks, list(values))
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlim(left=0)
    axis.set_xlabel(xlabel)
    _legend(figure, list(handles.values()), columns=2)
    return figure


@styled
def stacked(rows, xlabel):
    """[(label, {part: value})] as bars of parts laid end to end, the sum beside each."""
    parts = list(dict.fromkeys(part for _, values in rows for part in values))
    figure, ((axis,),) = _figure(1.6 + 0.42 * len(rows))
    colours = dict(zip(parts, PART_COLOURS, strict=False))
    handles = {}
    for at, (_, values) in enumerate(rows):
        left = 0.0
        for part, value in values.items():
            bar = axis.barh(at, value, 0.7, left=left, color=colours.get(part, "#444444"))
            bar.set_label(part)
            handles.setdefault(part, bar)
            left += value
        axis.annotate(f"{left:.4g}", (left, at), (3, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8.5)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel(xlabel)
    _legend(figure, list(handles.values()))
    return figure


@styled
def roofline(points, roof, xlabel, ylabel):
    """{operator: {implementation: (x, y)}}: a marker each operator, a colour each implementation.

    roof = (y, label) is what the machine can do at best.
    """
    figure, ((axis,),) = _figure(4.6)
    colours, markers = {}, {}
    for marker, (operator, found) in zip(OPERATOR_MARKERS, points.items(), strict=False):
        for name, (x, y) in found.items():
            label, colour, _ = look(name)
            axis.plot(x, y, marker, color=colour, markersize=8, markeredgecolor="white")
            colours.setdefault(name, axis.plot([], [], "s", color=colour, label=label)[0])
        markers[operator] = axis.plot([], [], marker, color="#222222", label=operator)[0]
    y, label = roof
    line = axis.axhline(y, color="#222222", linestyle="--", linewidth=1, label=label)
    _octaves(axis, [x for found in points.values() for x, _ in found.values()])
    axis.set_ylim(bottom=0)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(color="#e6e6e6", linewidth=0.6)
    _legend(figure, [*colours.values(), line])
    _legend(figure, list(markers.values()), "outside lower left")
    return figure


@styled
def curves(panels, xlabel, ylabel, roof=None, log=True):
    """{operator: {implementation: [(x, y)]}}: a panel each operator, axes in powers."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _figure(0.9 + 1.9 * rows, rows, columns)
    handles = {}
    for axis, (operator, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, points in lines.items():
            label, colour, marker = look(name)
            x, y = zip(*sorted(points), strict=True)
            style = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.4}
            (line,) = axis.plot(x, y, label=label, **style)
            handles.setdefault(name, line)
        if roof:
            y, label = roof
            line = axis.axhline(y, color="#222222", linestyle="--", linewidth=1, label=label)
            handles.setdefault("roof", line)
        _octaves(axis, [x for points in lines.values() for x, _ in points])
        if log:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=12))
            axis.yaxis.set_major_formatter(PLAIN)
            axis.yaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_ylim(bottom=0)
        axis.set_title(operator, fontsize=8.5)
        axis.grid(color="#e6e6e6", linewidth=0.6)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    _legend(figure, list(handles.values()))
    return figure


@styled
def dots(rows, xlabel):
    """[(label, floor, {implementation: value})]: a dot each on an axis in powers, a tick the floor.

    Dots of one row stand a little above each other, so that equal ones are all seen.
    """
    names = list(dict.fromkeys(name for _, _, values in rows for name in values))
    figure, ((axis,),) = _figure(1.3 + 0.4 * len(rows))
    handles = {}
    for at, (_, floor, values) in enumerate(rows):
        for i, name in enumerate(names):
            if name in values:
                label, colour, marker = look(name)
                y = at + (i - (len(names) - 1) / 2) * 0.72 / len(names)
                (dot,) = axis.plot(values[name], y, marker, color=colour, label=label, markersize=5)
                handles.setdefault(name, dot)
        style = {"color": "#222222", "linewidth": 1.2, "zorder": 1}
        (tick,) = axis.plot([floor] * 2, [at - 0.42, at + 0.42], **style)
        tick.set_label("must move")
        axis.axhline(at + 0.5, color="#e6e6e6", linewidth=0.6)
    axis.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=8.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    _octaves(axis, [v for _, floor, values in rows for v in (floor, *values.values())])
    axis.set_xlabel(xlabel)
    _legend(figure, [*handles.values(), tick])
    return figure


def _octaves(axis, values):
    """A horizontal axis in powers of two, from the one below the least to that above the most."""
    low, high = (math.log2(of(values)) for of in (min, max))
    axis.set_xscale("log", base=2)
    axis.set_xlim(2 ** math.floor(low - 0.2), 2 ** math.ceil(high + 0.2))
    axis.xaxis.set_major_formatter(PLAIN)
    axis.xaxis.set_minor_formatter(NullFormatter())


def draw(profiles, path):
    """The README's: milliseconds per step of each operator as bars, a panel for each device."""
    figure = Figure(figsize=(8, 3.2 * len(profiles)), layout="constrained")
    axes = figure.subplots(len(profiles), 1, squeeze=False)
    colours = {"eager": "#b8b8b8", "compile": "#7aa6c2", "fused": "#d9622b"}
    for axis, profile in zip(axes[:, 0], profiles, strict=True):
        rows = [r for r in profile.rows if r.part_of is None]
        for i, (name, colour) in enumerate(colours.items()):
            at = [k + (i - 1) * 0.27 for k in range(len(rows))]
            bars = axis.barh(at, [r.ms_per_step(name) for r in rows], 0.25, color=colour)
            bars.set_label(look(name)[0])
            axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axis.set_yticks(range(len(rows)), [r.title for r in rows])
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("milliseconds per optimizer step (lower is better)")
        blocks, device = profile.run["blocks"], profile.run["device"]
        axis.set_title(f"{device}, backend {profile.run['backend']}, {blocks} blocks", fontsize=10)
        axis.legend(frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": STYLE["svg.hashsalt"]}):
        figure.savefig(path, metadata={"Date": None})
