"""Tables and plots of the newest records: report.md and report.html; in the README, its figures.

Of the records of this checkout, bench/results, it also writes the README's sections and picture. At
the end it tells where the backends that CUDA tensors take by default are not the fastest recorded.
"""

from pathlib import Path

from bench.common import options as opt
from bench.common import records, text_tables
from bench.measure import profile as profiles
from bench.measure.profile import Profile
from bench.report import html, plots, select, tables
from bench.static import predict, roofline, traffic
from bench.static.traffic import TrafficRecord

README = Path(__file__).parent.parent.parent / "README.md"
PICTURE = records.RESULTS / "profile.svg"
MARKS = "<!-- bench {}: begin -->", "<!-- bench {}: end -->"


def committed(kind="profile"):
    """Every committed record of a kind, oldest first."""
    read = {"profile": Profile.from_json, "traffic": TrafficRecord.from_json}[kind]
    return [read(record) for record in records.read_folder(kind=kind)]


def latest():
    """The newest committed profile of each device."""
    return list({p.run["device"]: p for p in committed()}.values())


def markdown(profile):
    """The README's section for one profile."""
    shown = (0, 1, 4, 5, 6, 7, 8, 9, 10)
    rows = [[c[i] for i in shown] for c in (profiles.COLUMNS, *profiles.cells(profile))]
    bullets = (f"- {note}" for note in profiles.notes(profile))
    table = text_tables.markdown(rows[0], rows[1:])
    return "\n".join([table, "", profiles.headline(profile) + ".", "", *bullets])


def readme_sections():
    """{name of a pair of marks in the README: what stands between them}."""
    parts = [f"![Milliseconds per step]({PICTURE.relative_to(README.parent)})"]
    sections = {"report": "\n\n".join(parts + [markdown(p) for p in latest()])}
    for count in committed("traffic")[-1:]:
        columns, rows, total = traffic.traffic_cells(count)
        bullets = (f"- {note}" for note in traffic.traffic_notes(count))
        table = text_tables.markdown(columns, [*rows, total])
        sections["traffic"] = "\n".join([table, "", *bullets])
        sections["predict"] = _predicted()
    return sections


def _predicted():
    found = records.read_folder()
    speeds = {gpu: roofline.bandwidth(gpu, found) for gpu in roofline.DATASHEET}
    count, _ = roofline.newest_count(found)
    columns, rows = predict.summary_cells(count, speeds)
    notes = [f"{gpu.upper()}: {speed.source}." for gpu, speed in speeds.items()]
    launch = 1e6 * roofline.LAUNCH_SECONDS
    notes.append(
        f"{predict.TOKENS:,} tokens, {predict.PAPER_BLOCKS} blocks, {launch:g} us a launch, "
        "assumed. Calculated, not measured; python -m bench predict tells what it rests on."
    )
    return "\n".join([text_tables.markdown(columns, rows), "", *(f"- {note}" for note in notes)])


def write_readme():
    """Put the newest committed records into the README and draw them."""
    for name, section in readme_sections().items():
        begin, end = (mark.format(name) for mark in MARKS)
        path = PAGES[name]
        before, rest = path.read_text().split(begin)
        path.write_text(f"{before}{begin}\n{section}\n{end}{rest.split(end)[1]}")
    plots.draw(latest(), PICTURE)


def text(found):
    """report.md: the tables of every kind."""
    shown = tables.sections(found)
    parts = [f"# {html.TITLE}", html.ABOUT, "## Machines", _section_table(tables.machines(found))]
    for section in shown:
        if section.tables:
            parts.append(f"## {section.title}")
        for table in section.tables:
            parts += [f"### {_plain(table.title)}", _section_table(table)]
    parts += [_plain(line) for line in html.absent(shown, found)]
    return "\n\n".join(parts) + "\n"


def _section_table(table):
    rows = [*table.rows, table.total] if table.total else table.rows
    columns, *rows = ([_plain(cell) for cell in row] for row in (table.columns, *rows))
    bullets = [f"- {_plain(note)}" for note in table.notes]
    bullets += [f"- Source: {_plain(source)}" for source in table.sources]
    return "\n".join([text_tables.markdown(columns, rows), "", *bullets])


def _plain(line):
    """One line of Markdown that shows these characters."""
    return " ".join(line.replace("|", "\\|").replace("<", "&lt;").split())


def write(folder, out):
    """report.md and report.html of a folder's records; of the committed ones, the README too."""

    found = select.read(folder)
    if not out.is_dir():
        raise ValueError(f"--out: no folder {out}; make it first")
    written = [out / "report.md", out / "report.html"]
    for path, content in zip(written, (text(found), html.html(found)), strict=True):
        path.write_text(content, encoding="utf-8")
    committed = _committed(folder)
    if committed:
        write_readme()
        written += [README, PICTURE]
    return written, select.disagreements(found, committed)


def _committed(folder):
    return Path(folder).resolve() == records.RESULTS.resolve()


def options(p):
    p.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=records.RESULTS,
        metavar="DIR",
        help="folder of records, *.jsonl",
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where report.md and report.html go (default: DIR)",
    )


def command(args):
    written, lines = write(args.folder, args.out or args.folder)
    console = opt.console()
    for line in (*(f"wrote {path}" for path in written), *lines):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
