"""report.html: headline figures, plots and tables in one file that needs no other."""

from html import escape

from bench.common import text_tables
from bench.report import plots, select
from bench.report.figures import pictures
from bench.report.tables import machines, sections, unknown

STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --dim: #5c5c5c; --back: #fcfcfb;
  --card: #f1f0ed; --line: #d9d7d2; --accent: #b4481a; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e6e3; --dim: #a8a5a0; --back: #161616;
  --card: #222221; --line: #3a3937; --accent: #f08a57; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1.2rem 1rem 4rem; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.4rem 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 0.6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 0.4rem; }
p { max-width: 75ch; margin: 0.4rem 0; }
ul { margin: 0.4rem 0; padding-left: 1.2rem; color: var(--dim); font-size: 0.86rem; }
.source { color: var(--dim); font-size: 0.8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 0.8rem 1rem; }
.card h3 { margin: 0; }
.figures { display: flex; flex-wrap: wrap; gap: 0.4rem 1.3rem; margin: 0.3rem 0;
  font-size: 0.82rem; }
.figures b { display: block; font-size: 1.9rem; line-height: 1.2; color: var(--accent); }
.cards { display: grid; gap: 0.8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
.plots { columns: 480px 2; column-gap: 1.2rem; }
figure { margin: 0 0 1.2rem; break-inside: avoid; border: 1px solid var(--line);
  border-radius: 10px; overflow: hidden; background: var(--card); }
figure h3, figcaption { margin: 0; padding: 0.6rem 0.9rem; }
figcaption { font-size: 0.86rem; }
figure svg { display: block; width: 100%; height: auto; background: #ffffff; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.84rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { color: var(--dim); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.total td { font-weight: 700; border-top: 2px solid var(--line); }
details { border-top: 1px solid var(--line); padding: 0.5rem 0; }
summary { cursor: pointer; font-size: 1.05rem; font-weight: 600; }
"""

TITLE = "mvsplit-ops, measured"
ABOUT = (
    "Fused operators of deep Diffusion Transformers (RoPE, QK-Norm, SwiGLU, the Mean-Variance "
    "Split residual with RMSNorm), beside eager PyTorch, torch.compile and other kernels. Written "
    "by python -m bench report from records of measurements; every figure names its record."
)


def html(found):
    """The page of a folder's records."""
    shown = sections(found)
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(TITLE)}</title>",
        '<link rel="icon" href="data:,">',
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{escape(TITLE)}</h1>",
        f"<p>{escape(ABOUT)}</p>",
        '<div class="cards">',
        *map(_headline, select.headlines(found)),
        "</div>",
        "<h2>Plots</h2>",
        '<div class="plots">',
        *(_picture(i, picture) for i, picture in enumerate(pictures(found))),
        "</div>",
        "<h2>Tables</h2>",
        _details("Machines", [machines(found)]),
        *(_details(s.title, s.tables) for s in shown if s.tables),
        *(f"<p>{escape(line)}</p>" for line in absent(shown, found)),
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def absent(shown, found):
    """Lines: what has no record, and how to make one; what is there and not shown."""
    lines = [f"{s.title}: no record yet; {s.command} makes one." for s in shown if not s.tables]
    return lines + [f"Records of kind {kind} are not shown." for kind in unknown(found)]


def _headline(headline):
    numbers = [(f"{headline.eager:.2f}x", "speed-up over eager PyTorch")]
    if headline.compile:
        numbers.append((f"{headline.compile:.2f}x", "speed-up over torch.compile"))
    numbers.append((f"{100 * headline.copy:.0f}%", "of the copy bandwidth"))
    figures = "".join(f"<span><b>{escape(n)}</b>{escape(of)}</span>" for n, of in numbers)
    shape = text_tables.shape_text(headline.found[0].run["shape"])
    return (
        f'<div class="card"><h3>{escape(headline.device)}, backend {escape(headline.backend)}</h3>'
        f'<div class="figures">{figures}</div>'
        f'<div class="source">The operators of one optimizer step, {escape(shape)}.</div>'
        f"{_sources(select.origins(headline.found))}</div>"
    )


def _picture(number, picture):
    return (
        f"<figure><h3>{escape(picture.title)}</h3>\n{plots.svg(picture.figure, f'p{number}')}\n"
        f"<figcaption>{escape(picture.text)}{_sources(picture.sources)}</figcaption></figure>"
    )


def _sources(lines):
    return "".join(f'<div class="source">{escape(line)}</div>' for line in lines)


def _details(title, tables):
    body = "\n".join(map(_table, tables))
    return f"<details><summary>{escape(title)}</summary>\n{body}\n</details>"


def _table(table):
    def row(cells, tag="td", kind=""):
        inner = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
        return f"<tr{kind}>{inner}</tr>"

    lines = [row(table.columns, "th"), *map(row, table.rows)]
    if table.total:
        lines.append(row(table.total, kind=' class="total"'))
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return "\n".join(
        [
            f"<h3>{escape(table.title)}</h3>",
            f'<div class="scroll"><table>{"".join(lines)}</table></div>',
            f"<ul>{notes}</ul>" if notes else "",
            _sources(table.sources),
        ]
    )
