"""Options that several commands share, what they become, and how a command shows that it works."""

import contextlib
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.cases import CASES, Shape
from model.options import positive
from mvsplit_ops._check import DTYPES


def token_counts(text):
    return tuple(positive(part) for part in text.replace("+", ",").split(","))


def add_shape(command):
    defaults = Shape()
    command.add_argument("--batch", type=positive, default=defaults.B, help="samples per call")
    command.add_argument(
        "--tokens",
        type=token_counts,
        default=defaults.segments,
        metavar="N[,N..]",
        help="tokens of each segment of a sample: image, text",
    )
    command.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the activations")


def add_device(command):
    command.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    command.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's)")


def add_ops(command, cases=CASES):
    ops = [case.op for case in cases]
    command.add_argument(
        "--op",
        nargs="+",
        choices=ops,
        default=ops,
        metavar="OP",
        help=f"these alone, of {', '.join(ops)}",
    )


def add_json(command):
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="add every record to FILE, one a line"
    )


def chosen(ops, cases=CASES):
    """The cases of --op."""
    return [case for case in cases if case.op in ops]


def shape(args, device):
    """The Shape of --batch, --tokens and --dtype; what is None is the default's."""
    given = {"B": args.batch, "segments": args.tokens, "dtype": DTYPES.get(args.dtype)}
    return Shape(**{name: value for name, value in given.items() if value}, device=device)


def device(args):
    """The device of --device, with --threads set; ValueError where it cannot be used."""
    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device: must be cpu, cuda or cuda:N, got {name!r}")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: cannot use {name!r} here: {reason}") from error
    if ":" in name and name.startswith("cuda"):
        torch.cuda.set_device(name)  # streams and graphs are the current device's
    return name


def writable(path, option="--json"):
    """ValueError, before anything is measured, where a file cannot be made."""
    if path and not path.resolve().parent.is_dir():
        raise ValueError(f"{option}: no folder {path.resolve().parent}; make it first")


def console():
    return Console(width=None if sys.stdout.isatty() else 190)


@contextlib.contextmanager
def progress(name):
    """progress(what is done now, steps in all), shown as a bar on stderr."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)

        def advance(what, steps):
            bar.update(task, description=what, total=steps)
            bar.advance(task)

        yield advance
