"""Tables of strings, on a terminal or in Markdown, and the text of a shape in their notes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table as TerminalTable

NOTHING = "–"  # a cell without a value

Row = Sequence[str]


def build_table(
    title: str,
    columns: Row,
    rows: Iterable[Row],
    caption: Sequence[str] = (),
    total: Row | None = None,
) -> TerminalTable:
    """Return a rich table: text, then columns of numbers; `total` is the last row."""
    table = TerminalTable(title=title, caption="\n".join(caption) or None, caption_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    if total:
        table.add_section()
        table.add_row(*total, style="bold")
    return table


def format_markdown(columns: Row, rows: Iterable[Row]) -> str:
    """Return a Markdown table: text, then columns of numbers."""
    head, *body = ("| " + " | ".join(row) + " |" for row in (columns, *rows))
    rule = "|" + "|".join([" --- "] + [" ---: "] * (len(columns) - 1)) + "|"
    return "\n".join([head, rule, *body])


def format_ratio(base: float | None, value: float) -> str:
    """Return how many times faster `value` is than `base`, both in seconds."""
    return f"{base / value:.2f}x" if base else NOTHING


def format_scaled(value: float | None, unit: float, digits: int = 1) -> str:
    return NOTHING if value is None else f"{value / unit:,.{digits}f}"


def shape_text(shape: Mapping[str, Any]) -> str:
    """Return the size and the width of a record's shape."""
    return f"{size_text(shape)}, {width_text(shape)}"


def size_text(shape: Mapping[str, Any]) -> str:
    return f"B {shape['B']}, T {'+'.join(map(str, shape['segments']))}"


def width_text(shape: Mapping[str, Any]) -> str:
    return f"D {shape['D']}, H {shape['H']}, F {shape['F']}, {shape['dtype']}"
