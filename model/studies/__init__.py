"""Studies: small trainings on the CPU that test a claim. Each is a module with a class of its own.

amplification   A - 1 against (T - 1) kappa, which arXiv 2605.06169 finds proportional
outcomes        controls: who locks; guard: how often it finds a collapse, how early, how wrong
overhead        what the taps cost a step
"""

import datetime
import json
from pathlib import Path

import torch
from rich.table import Table

from model.studies.amplification import Amplification
from model.studies.outcomes import Controls, Guarded
from model.studies.overhead import Overhead
from model.train import checkpoint

STUDIES = {
    "amplification": Amplification(),
    "controls": Controls(),
    "guard": Guarded(),
    "overhead": Overhead(),
}
IN_THE_NAME = ("blocks", "residual", "seed", "lr", "steps")  # of a run, and so not shown


def run(name, out=None, seeds=None, blocks=None, steps=None, show=lambda done, steps: None):
    """Run a study; returns its results and the files written: DIR/STUDY.json, perhaps STUDY.png.

    seeds, blocks, steps   of its trainings; None: the study's own
    show                   called as it goes with the steps done and all of them
    """
    study, out = STUDIES[name], Path(out or f"runs/study-{name}")
    results = {
        "study": name, "date": datetime.date.today().isoformat(), "commit": checkpoint.commit(),
        "torch": torch.__version__, **study.run(out, blocks, seeds, steps, show),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.json"]
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    picture = out / f"{name}.png"
    return results, paths + ([picture] if study.draw(results, out, picture) else [])


def table(results):
    """The rows of a study as a table for the terminal."""
    view = Table()
    shown = [name for name in results["rows"][0] if name not in IN_THE_NAME]
    for name in shown:
        words = isinstance(results["rows"][0][name], str)
        view.add_column(name.replace("_", " "), justify="left" if words else "right")
    for row in results["rows"]:
        view.add_row(*(_cell(row[name]) for name in shown))
    return view


def _cell(value):
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def conclusions(results):
    """What a study found, a sentence each."""
    return STUDIES[results["study"]].conclusions(results)
