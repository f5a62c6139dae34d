"""The report of a folder's records: Markdown, and an HTML page that needs no other file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from bench.common.text_tables import Table, plain_markdown, shape_text
from bench.report import figures, plots, tables
from bench.report.figures import Figure
from bench.report.select import Headline, SourcedRecord, list_sources, make_headlines

TITLE = "mvsplit-ops, measured"
ABOUT = (
    "Fused operators for deep Diffusion Transformers (RoPE, QK-Norm, SwiGLU, the Mean-Variance "
    "Split residual with RMSNorm), compared with eager PyTorch, torch.compile and other kernels. "
    "Written by python -m bench report from recorded measurements; every table and figure names "
    "its records."
)
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)

# kind of record: (title of its section, command that makes a record)
KINDS = {
    "profile": ("Operators per optimizer step", "profile --json FILE"),
    "ops": ("Operators over a range of shapes, with peers", "ops --json FILE"),
    "in_loop": ("Operators within training steps", "profile --in-loop --json FILE"),
    "step": ("Whole optimizer steps", "step --json FILE"),
    "traffic": ("Bytes moved by one call", "traffic --json FILE"),
    "predict": ("Predicted and measured times", "traffic --json FILE"),  # no records of its own
    "machine": ("Peak rates of the machine", "machine --json FILE"),
    "resources": ("Compiled kernels", "resources --json FILE"),
}


@dataclass(frozen=True)
class Report:
    """Everything that is shown. absent: lines about kinds without a record, and unknown kinds."""

    headlines: list[Headline]
    figures: list[Figure]
    sections: list[tuple[str, list[Table]]]  # title, tables
    absent: list[str]


def build_report(records: Sequence[SourcedRecord]) -> Report:
    tables_by_kind = tables.make_tables(records)
    sections = [("Machines", [tables.machine_overview(records)])]
    absent = []
    for kind, (title, command) in KINDS.items():
        if tables_by_kind[kind]:
            sections.append((title, tables_by_kind[kind]))
        else:
            absent.append(f"{title}: no record yet; python -m bench {command} makes one.")
    unknown = sorted({record.kind for record in records} - set(KINDS))
    absent += [f"Records of kind {kind} are not shown." for kind in unknown]
    return Report(make_headlines(records), figures.make_figures(records), sections, absent)


def to_markdown(report: Report) -> str:
    parts = [f"# {TITLE}", ABOUT]
    for title, section in report.sections:
        parts.append(f"## {title}")
        for table in section:
            heading = [f"### {plain_markdown(table.title)}"] if table.title != title else []
            parts += [*heading, table.to_markdown()]
    return "\n\n".join([*parts, *map(plain_markdown, report.absent)]) + "\n"


def to_html(report: Report) -> str:
    svgs = [plots.to_svg(f.drawing, f"f{i}") for i, f in enumerate(report.figures)]
    page = TEMPLATES.get_template("page.html.jinja")
    helpers = {"shape_text": shape_text, "list_sources": list_sources}
    return page.render(title=TITLE, about=ABOUT, report=report, svgs=svgs, **helpers)
