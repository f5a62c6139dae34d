"""The report of a folder's records: Markdown, and an HTML page that needs no other file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2

from bench.common.text_tables import shape_text
from bench.report import figures, plots, tables
from bench.report.figures import Figure
from bench.report.select import Headline, SourcedRecord, list_sources, make_headlines, newest
from bench.report.tables import Table, plain_markdown

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

Records = Sequence[SourcedRecord]
Item = TypeVar("Item")


def each(
    kind: str, make: Callable[[SourcedRecord[Any]], Item | None]
) -> Callable[[Records], list[Item]]:
    """Return a function that makes an item of each newest record of a kind, unless it is None."""

    def make_all(records: Records) -> list[Item]:
        return [item for r in newest(records, kind) if (item := make(r)) is not None]

    return make_all


@dataclass(frozen=True)
class Kind:
    """A kind of record: its title, the command that makes a record, its tables and figures."""

    title: str
    command: str
    tables: Callable[[Records], list[Table]]
    figures: tuple[Callable[[Records], list[Figure]], ...] = ()


KINDS = {
    "profile": Kind(
        "Operators per optimizer step",
        "profile --json FILE",
        each("profile", tables.profile_table),
        (each("profile", figures.speed_up_figure), each("profile", figures.roofline_figure)),
    ),
    "ops": Kind(
        "Operators over a range of shapes, with peers",
        "ops --json FILE",
        tables.sweep_tables,
        (figures.sweep_figures,),
    ),
    "in_loop": Kind(
        "Operators within training steps",
        "profile --in-loop --json FILE",
        each("in_loop", tables.in_loop_table),
        (each("in_loop", figures.in_loop_figure), each("in_loop", figures.paper_figure)),
    ),
    "step": Kind(
        "Whole optimizer steps",
        "step --json FILE",
        each("step", tables.step_table),
        (each("step", figures.step_figure),),
    ),
    "traffic": Kind(
        "Bytes moved by one call",
        "traffic --json FILE",
        each("traffic", tables.traffic_table),
        (each("traffic", figures.traffic_figure),),
    ),
    "predict": Kind(  # no records of its own: counted bytes and measured times
        "Predicted and measured times",
        "traffic --json FILE",
        tables.prediction_tables,
        (figures.prediction_figures,),
    ),
    "machine": Kind(
        "Peak rates of the machine", "machine --json FILE", each("machine", tables.machine_table)
    ),
    "resources": Kind(
        "Compiled kernels", "resources --json FILE", each("resources", tables.resource_table)
    ),
}


@dataclass(frozen=True)
class Report:
    """Everything that is shown. absent: lines about kinds without a record, and unknown kinds."""

    headlines: list[Headline]
    figures: list[Figure]
    sections: list[tuple[str, list[Table]]]  # title, tables
    absent: list[str]


def build_report(records: Records) -> Report:
    sections = {kind.title: kind.tables(records) for kind in KINDS.values()}
    absent = [
        f"{kind.title}: no record yet; python -m bench {kind.command} makes one."
        for kind in KINDS.values()
        if not sections[kind.title]
    ]
    unknown = sorted({record.kind for record in records} - set(KINDS))
    return Report(
        headlines=make_headlines(records),
        figures=[f for kind in KINDS.values() for make in kind.figures for f in make(records)],
        sections=[
            ("Machines", [tables.machine_overview(records)]),
            *((title, shown) for title, shown in sections.items() if shown),
        ],
        absent=[*absent, *(f"Records of kind {kind} are not shown." for kind in unknown)],
    )


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
    return TEMPLATES.get_template("page.html.jinja").render(
        title=TITLE,
        about=ABOUT,
        report=report,
        svgs=svgs,
        shape_text=shape_text,
        list_sources=list_sources,
    )
