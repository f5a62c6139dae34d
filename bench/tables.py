"""A table of strings, on a terminal or in Markdown: a column of text, then columns of figures."""


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
