"""Tables of strings, on a terminal or in Markdown, and the text of a shape in their notes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table as TerminalTable

NOTHING = "–"  # a cell without a value

Row = Sequence[str]


@dataclass(frozen=True)
class Table:
    """Text, then columns of numbers; a last row with totals; notes and sources below the table."""

    title: str
    columns: Row
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    total: Row | None = None
    sources: Sequence[str] = ()

    def to_terminal(self) -> TerminalTable:
        caption = "\n".join(self.notes) or None
        table = TerminalTable(title=self.title, caption=caption, caption_justify="left")
        for i, name in enumerate(self.columns):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        if self.total:
            table.add_section()
            table.add_row(*self.total, style="bold")
        return table

    def to_markdown(self) -> str:
        """Return the table and its lines, without the title."""
        rows = [self.columns, *self.rows, *([self.total] if self.total else [])]
        cells = ["| " + " | ".join(map(plain_markdown, row)) + " |" for row in rows]
        rule = "|" + "|".join([" --- "] + [" ---: "] * (len(self.columns) - 1)) + "|"
        lines = (*self.notes, *(f"Source: {source}" for source in self.sources))
        bullets = [f"- {plain_markdown(line)}" for line in lines]
        return "\n".join([cells[0], rule, *cells[1:], "", *bullets])


def plain_markdown(line: str) -> str:
    """Return one line of Markdown that shows these characters."""
    return " ".join(line.replace("|", "\\|").replace("<", "&lt;").split())


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
