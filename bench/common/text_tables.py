"""A table of strings, on a terminal or in Markdown: a column of text, then columns of figures."""

NOTHING = "–"  # in a cell without a value


def terminal(title, columns, rows, caption=(), total=None):
    """A rich table; `total` is a last row apart, `caption` lines below it."""
    from rich.table import Table

    table = Table(title=title, caption="\n".join(caption) or None, caption_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    if total:
        table.add_section()
        table.add_row(*total, style="bold")
    return table


def markdown(columns, rows):
    head, *body = ("| " + " | ".join(row) + " |" for row in (columns, *rows))
    rule = "|" + "|".join([" --- "] + [" ---: "] * (len(columns) - 1)) + "|"
    return "\n".join([head, rule, *body])


def shape_text(shape):
    return f"{size_text(shape)}, {width_text(shape)}"


def size_text(shape):
    return f"B {shape['B']}, T {'+'.join(map(str, shape['segments']))}"


def width_text(shape):
    return f"D {shape['D']}, H {shape['H']}, F {shape['F']}, {shape['dtype']}"
