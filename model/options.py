"""Command line of `python -m model`. Importing this module does not import torch."""

import argparse
import math
from pathlib import Path

from model.config import FIELDS, GUARDS, PRESETS

DEFAULT_PRESET = "tiny"
PLACE = ("device", "threads", "backend", "data_path")  # fields that say where a model runs
STUDIES = {
    "amplification": "is A - 1 of a writer's gradient (T - 1) kappa, the coherence of its tokens?",
    "controls": "which residuals and remedies keep 100 blocks out of the token mean?",
    "guard": "does the guard detect every collapse and nothing else, at 100 and 400 blocks?",
    "overhead": "how much time do taps on four blocks add to a step at 400 blocks?",
}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(prog="python -m model", description=description)
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")

    _add_train(add("train", "train a model, or resume a run"))
    _add_info(add("info", "print parameters, FLOPs and memory without allocating them"))
    _add_demo(add("demo", "watch a collapse: train three residuals at a time on the CPU"))
    _add_diagnose(add("diagnose", "replay the collapse guard over a run or a trace and draw it"))
    _add_study(add("study", "test a claim with small trainings on the CPU"))
    _add_sample(add("sample", "write images of a run as a PNG grid, and their settings as JSON"))
    _add_eval(add("eval", "print the share of samples that match their captions (data=shapes)"))
    _add_export(add("export", "write the weights of a run to a file"))
    _add_import(add("import", "create a run from a file of weights, which must fit exactly"))
    return top


def _add_train(p: argparse.ArgumentParser) -> None:
    _add_config(p)
    p.add_argument(
        "--out", type=Path, metavar="RUN", help="folder of the run (default: runs/PRESET)"
    )
    p.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: resume the run if it exists; never: start from scratch; PATH: start "
        "from this checkpoint (default: %(default)s)",
    )
    p.add_argument(
        "--guard",
        choices=GUARDS,
        help="action of the collapse guard: warn: only report; stop: end a collapsed "
        "run with exit code 3; skip: like stop, and skip updates at a TRIP (default: "
        "stop; off if probes=false)",
    )
    p.add_argument("--quiet", action="store_true", help="print no progress")


def _add_info(p: argparse.ArgumentParser) -> None:
    _add_config(p)
    p.add_argument(
        "--measure",
        action="store_true",
        help="also take two steps on this machine and compare their memory with the prediction",
    )


def _add_demo(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "preset",
        nargs="?",
        default="collapse100",
        choices=[n for n in PRESETS if n.startswith("collapse")],
        help="preset to train (default: %(default)s)",
    )
    _add_set(p)
    p.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the runs and the figure (default: runs/demo-PRESET)",
    )


def _add_diagnose(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "trace",
        type=Path,
        metavar="RUN|TRACE",
        help="a run, one of its collapse-STEP folders, a metrics.jsonl, or a trace file "
        "(.json, in the format of model/stability/trace.py)",
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE.png",
        help="figure (default: NAME-mms.png next to the trace, overwritten)",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the findings as JSON")


def _add_study(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "study",
        choices=STUDIES,
        help="; ".join(f"{name}: {claim}" for name, claim in STUDIES.items()),
    )
    p.add_argument(
        "--seeds",
        type=positive,
        metavar="N",
        help="number of seeds of each training (default: 1; guard: 3)",
    )
    p.add_argument(
        "--blocks",
        type=int,
        nargs="+",
        choices=(100, 400),
        metavar="100|400",
        help="depths to train (default: 100; guard: 100 400; overhead: 400)",
    )
    p.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="steps of each training (default: those of the preset)",
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the runs, STUDY.json and STUDY.png; interrupted trainings are "
        "resumed (default: runs/study-STUDY)",
    )


def _add_sample(p: argparse.ArgumentParser) -> None:
    _add_run(p)
    p.add_argument(
        "--caption",
        nargs="+",
        metavar="TEXT",
        help="captions of the images (default: n different ones)",
    )
    p.add_argument("-n", type=positive, default=16, help="number of images (default: %(default)s)")
    _add_sampling(p)
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE.png",
        help="file of the grid (default: a new file in the samples/ of the run)",
    )


def _add_eval(p: argparse.ArgumentParser) -> None:
    _add_run(p)
    p.add_argument("-n", type=positive, default=64, help="number of images (default: %(default)s)")
    _add_sampling(p)
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the shares as JSON")


def _add_export(p: argparse.ArgumentParser) -> None:
    _add_run(p)
    p.add_argument(
        "--to",
        required=True,
        choices=("official", "safetensors"),
        help="official: model.pt in the published layout; safetensors: one file that "
        "contains the configuration",
    )
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="file of the weights")


def _add_import(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", type=Path, help="model.pt of the published layout, or .safetensors")
    _add_config(p, default=None)
    p.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the new run")


def _add_config(p: argparse.ArgumentParser, default: str | None = DEFAULT_PRESET) -> None:
    p.add_argument(
        "preset",
        nargs="?",
        metavar="PRESET",
        help=f"preset of the configuration, one of {', '.join(PRESETS)} (default: "
        f"{default or 'the configuration in the file'})",
    )
    p.add_argument(
        "--config", type=Path, metavar="FILE", help="config.json of a run, instead of a preset"
    )
    _add_set(p)


def _add_set(p: argparse.ArgumentParser) -> None:
    lines = [
        f"  {name:15} {f.metadata['help'].replace('%', '%%')}"
        + ("" if f.metadata["paper"] else " *")
        for name, f in FIELDS.items()
    ]
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.epilog = "\n".join(["fields (* not stated in the paper):", *lines])
    p.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="fields to change, listed below",
    )


def _add_run(p: argparse.ArgumentParser) -> None:
    p.add_argument("run_folder", type=Path, metavar="RUN", help="a run, or one of its checkpoints")
    p.add_argument(
        "--average",
        action="store_true",
        help="use the averaged weights of a run trained with ema > 0",
    )
    p.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help=f"fields to change, of {', '.join(PLACE)}",
    )


def _add_sampling(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the first image; each further image uses the next seed (default: "
        "%(default)s)",
    )
    p.add_argument(
        "--steps", type=positive, default=25, help="integration steps (default: %(default)s)"
    )
    p.add_argument(
        "--guidance",
        type=finite,
        default=2.0,
        help="scale of classifier-free guidance; 1: none (default: %(default)s)",
    )
    p.add_argument(
        "--method",
        choices=("euler", "heun"),
        default="euler",
        help="integration method (default: %(default)s)",
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value
