"""What `python -m model` understands; importing it takes no torch."""

import argparse
import math
from pathlib import Path

from model.config import FIELDS, GUARDS, PRESETS

DEFAULT_PRESET = "tiny"
PLACE = ("device", "threads", "backend", "data_path")  # what does not change what a run means
STUDIES = {
    "amplification": "is A - 1 of a writer's gradient (T - 1) kappa, the coherence of its tokens?",
    "controls": "which residuals and remedies keep 100 blocks out of the token mean?",
    "guard": "does the guard find every collapse and nothing else, at 100 and 400 blocks?",
    "overhead": "what do taps on four blocks cost a step at 400 blocks?",
}


def parser(description):
    top = argparse.ArgumentParser(prog="python -m model", description=description)
    commands = top.add_subparsers(dest="command", required=True)

    p = _command(commands, "train", "train a model, or go on with a run")
    _add_config(p)
    p.add_argument("--out", type=Path, metavar="RUN", help="its folder (default: runs/PRESET)")
    p.add_argument("--resume", default="auto", metavar="auto|never|PATH",
                   help="auto: go on where the run stands; never: begin; or from a checkpoint "
                   "(default: %(default)s)")  # fmt: skip
    p.add_argument("--guard", choices=GUARDS,
                   help="warn: tell what the collapse guard sees; stop: end a run that is locked, "
                   "with exit code 3; skip: and skip updates at a TRIP (default: stop; off where "
                   "probes=false)")  # fmt: skip
    p.add_argument("--quiet", action="store_true", help="no progress on the terminal")

    p = _command(commands, "info", "parameters, FLOPs and memory, before allocating any")
    _add_config(p)
    p.add_argument(
        "--measure",
        action="store_true",
        help="take two real steps here and set their memory beside the prediction",
    )

    p = _command(commands, "demo", "watch a collapse: three residuals side by side, CPU")
    p.add_argument("preset", nargs="?", default="collapse100",
                   choices=[n for n in PRESETS if n.startswith("collapse")])  # fmt: skip
    _add_set(p)
    p.add_argument("--out", type=Path, metavar="DIR", help="(default: runs/demo-PRESET)")

    p = _command(
        commands, "diagnose", "replay the collapse guard over a run or a trace, and draw it"
    )
    p.add_argument("trace", type=Path, metavar="RUN|TRACE",
                   help="a run, a collapse-STEP of one, a metrics.jsonl, or a trace file (.json; "
                   "its format stands in model/trace.py)")  # fmt: skip
    p.add_argument("--out", type=Path, metavar="FILE.png",
                   help="picture (default: NAME-mms.png beside the trace, replaced)")  # fmt: skip
    p.add_argument("--json", type=Path, metavar="FILE", help="write what was found here too")

    p = _command(commands, "study", "small trainings side by side that test a claim, CPU")
    p.add_argument("study", choices=STUDIES,
                   help="; ".join(f"{name}: {what}" for name, what in STUDIES.items()))  # fmt: skip
    p.add_argument("--seeds", type=positive, metavar="N",
                   help="of each training (default: 1; guard: 3)")  # fmt: skip
    p.add_argument("--blocks", type=int, nargs="+", choices=(100, 400), metavar="100|400",
                   help="depths (default: 100; guard: 100 400; overhead: 400)")  # fmt: skip
    p.add_argument("--steps", type=positive, metavar="N", help="(default: what the preset says)")
    p.add_argument("--out", type=Path, metavar="DIR",
                   help="its runs, STUDY.json and STUDY.png (default: runs/study-STUDY); what was "
                   "broken off goes on where it stood")  # fmt: skip

    p = _command(commands, "sample", "images from a run, a PNG grid and how it was made")
    _add_run(p)
    p.add_argument("--caption", nargs="+", metavar="TEXT", help="(default: n different ones)")
    p.add_argument("-n", type=positive, default=16, help="images (default: %(default)s)")
    _add_sampling(p)
    p.add_argument("--out", type=Path, metavar="FILE.png", help="(default: in the run's samples/)")

    p = _command(commands, "eval", "share of samples that match their captions (shapes)")
    _add_run(p)
    p.add_argument("-n", type=positive, default=64, help="images (default: %(default)s)")
    _add_sampling(p)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the shares here too")

    p = _command(commands, "export", "write a run's weights to a file")
    _add_run(p)
    p.add_argument(
        "--to",
        required=True,
        choices=("official", "safetensors"),
        help="official: the published model.pt; safetensors: with the configuration",
    )
    p.add_argument("--out", type=Path, required=True, metavar="FILE")

    p = _command(commands, "import", "make a run of a file of weights, strictly")
    p.add_argument("file", type=Path, help="model.pt of the published layout, or .safetensors")
    _add_config(p, default=None)
    p.add_argument("--out", type=Path, required=True, metavar="RUN")
    return top


def _command(commands, name, help):
    return commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")


def _add_config(p, default=DEFAULT_PRESET):
    p.add_argument(
        "preset",
        nargs="?",
        metavar="PRESET",
        help=f"{', '.join(PRESETS)} (default: {default or 'what the file says'})",
    )
    p.add_argument("--config", type=Path, metavar="FILE", help="a run's config.json, for a preset")
    _add_set(p)


def _add_set(p):
    lines = [
        f"  {name:15} {f.metadata['help'].replace('%', '%%')}"
        + ("" if f.metadata["paper"] else " *")
        for name, f in FIELDS.items()
    ]
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.epilog = "\n".join(["fields (* not stated in the paper):", *lines])
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
                   help="fields to change, listed below")  # fmt: skip


def _add_run(p):
    p.add_argument("run_folder", type=Path, metavar="RUN", help="a run, or one of its checkpoints")
    p.add_argument("--average", action="store_true", help="the averaged weights (--set ema=...)")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
                   help=", ".join(PLACE))  # fmt: skip


def _add_sampling(p):
    p.add_argument("--seed", type=int, default=0, help="of the first image; the next has the next")
    p.add_argument("--steps", type=positive, default=25, help="of integration (default: 25)")
    p.add_argument("--guidance", type=finite, default=2.0, help="scale; 1: none (default: 2)")
    p.add_argument("--method", choices=("euler", "heun"), default="euler")


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def finite(text):
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value
