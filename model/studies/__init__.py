"""Studies: small trainings on the CPU that test a claim, one module per study.

amplification    whether A - 1 is proportional to (T - 1) kappa, as arXiv 2605.06169 reports
controls         which residuals and remedies collapse
guard_verdicts   how often the guard detects a collapse, how early, and how often it is wrong
overhead         the cost of the taps per step
"""

import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.table import Table

from model.studies.amplification import Amplification
from model.studies.base import Progress, Results, Study
from model.studies.controls import Controls
from model.studies.guard_verdicts import GuardVerdicts
from model.studies.overhead import Overhead
from model.train import checkpoint

STUDY_BY_NAME: dict[str, Study] = {
    "amplification": Amplification(),
    "controls": Controls(),
    "guard": GuardVerdicts(),
    "overhead": Overhead(),
}
HIDDEN_COLUMNS = ("blocks", "residual", "seed", "lr", "steps")  # the name of the run states them


def run(
    name: str,
    out: str | Path | None = None,
    seeds: int | None = None,
    blocks: Sequence[int] | None = None,
    steps: int | None = None,
    show: Progress = lambda done, steps: None,
) -> tuple[Results, list[Path]]:
    """Run a study; return its results and the files written: DIR/STUDY.json, perhaps STUDY.png.

    seeds, blocks, steps   of its trainings; None: the study's defaults
    show                   called during the study with the steps taken and their total
    """
    study, out = STUDY_BY_NAME[name], Path(out or f"runs/study-{name}")
    results = {
        "study": name, "date": datetime.date.today().isoformat(),
        "commit": checkpoint.read_commit(), "torch": torch.__version__,
        **study.run(out, blocks, seeds, steps, show),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.json"]
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    picture = out / f"{name}.png"
    return results, paths + ([picture] if study.draw(results, out, picture) else [])


def make_table(results: Results) -> Table:
    """Return the rows of a study as a table for the terminal."""
    first, table = results["rows"][0], Table()
    columns = [name for name in first if name not in HIDDEN_COLUMNS]
    for name in columns:
        title = name.replace("_", " ")
        table.add_column(title, justify="left" if isinstance(first[name], str) else "right")
    for row in results["rows"]:
        table.add_row(*(_cell(row[name]) for name in columns))
    return table


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def conclusions(results: Results) -> Iterator[str]:
    """Yield the conclusions of a study, one sentence each."""
    return STUDY_BY_NAME[results["study"]].conclusions(results)
