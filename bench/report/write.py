"""Tables and figures of the newest records: report.md and report.html.

For the records of this checkout, bench/results, it also writes the generated sections and the
picture of the READMEs. Last, it prints where the default backends of CUDA tensors are not the
fastest recorded ones.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.common import options as opt
from bench.common.records import RESULTS, ROOT
from bench.report import select, tables
from bench.report.select import SourcedRecord, newest

PICTURE = "bench/results/profile.svg"
# generated section: the page that has it between a pair of marks
PAGES = {"report": "README.md", "traffic": "bench/README.md", "predict": "bench/README.md"}


def newest_of_devices(records: Sequence[SourcedRecord]) -> list[SourcedRecord]:
    """Return the newest profile of each device."""
    return list({record.device: record for record in newest(records, "profile")}.values())


def readme_sections(records: Sequence[SourcedRecord]) -> dict[str, str]:
    """Return the text of each generated section."""
    profiles = (
        tables.shorten_profile(tables.record_table(record)).to_markdown()
        for record in newest_of_devices(records)
    )
    traffic = tables.record_table(newest(records, "traffic")[-1])
    return {
        "report": "\n\n".join([f"![Milliseconds per step]({PICTURE})", *profiles]),
        "traffic": replace(traffic, sources=()).to_markdown(),
        "predict": tables.prediction_summary(records).to_markdown(),
    }


def write_readme(records: Sequence[SourcedRecord], root: Path) -> list[Path]:
    """Write the generated sections of a checkout's READMEs; return the files."""
    for name, section in readme_sections(records).items():
        path = root / PAGES[name]
        begin, end = f"<!-- bench {name}: begin -->", f"<!-- bench {name}: end -->"
        before, rest = path.read_text(encoding="utf-8").split(begin)
        after = rest.split(end)[1]
        path.write_text(f"{before}{begin}\n{section}\n{end}{after}", encoding="utf-8")
    return [*dict.fromkeys(root / page for page in PAGES.values())]


def write(folder: Path, out: Path, root: Path = ROOT) -> tuple[list[Path], list[str]]:
    """Write the report of a folder; return the files, and the lines of select.disagreements.

    root  the checkout whose READMEs are written, if the folder has the committed records
    """
    # Every command of python -m bench imports this module; importing matplotlib takes a second.
    from bench.report import figures, plots, render

    records = select.read_records(folder)
    if not out.is_dir():
        raise ValueError(f"--out: no folder {out}; make it first")
    report = render.build_report(records)
    pages = {"report.md": render.to_markdown(report), "report.html": render.to_html(report)}
    for name, content in pages.items():
        (out / name).write_text(content, encoding="utf-8")
    files = [out / name for name in pages]
    committed = folder.resolve() == RESULTS.resolve()
    if committed:
        files += [*write_readme(records, root), root / PICTURE]
        profiles = [record.data for record in newest_of_devices(records)]
        plots.save_svg(figures.draw_profiles(profiles), root / PICTURE)
    return files, select.disagreements(records, committed)


def add_options(parser: argparse.ArgumentParser) -> None:
    folder_help = "folder of records, *.jsonl"
    parser.add_argument(
        "folder", nargs="?", type=Path, default=RESULTS, metavar="DIR", help=folder_help
    )
    out_help = "folder of report.md and report.html (default: DIR)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=out_help)


def run_command(args: argparse.Namespace) -> None:
    files, lines = write(args.folder, args.out or args.folder)
    console = opt.make_console()
    for line in (*(f"wrote {path}" for path in files), *lines):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
