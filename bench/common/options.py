"""Command-line options that several commands share, and the progress bar of a command."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.cases import CASES, Case, Shape
from model.options import positive
from mvsplit_ops._check import DTYPES

ReportProgress = Callable[[str, int], None]  # (activity that begins, activities in all)


def no_progress(activity: str, steps: int) -> None:
    """Report nothing: the progress callback of a measurement that no command shows."""


def token_counts(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.replace("+", ",").split(","))


def add_shape(parser: argparse.ArgumentParser) -> None:
    defaults = Shape()
    add_count(parser, "--batch", "samples per call", defaults.B)
    parser.add_argument(
        "--tokens",
        type=token_counts,
        default=defaults.segments,
        metavar="N[,N..]",
        help="tokens of each segment of a sample: image, text",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the activations")


def add_count(
    parser: argparse.ArgumentParser, name: str, help: str, default: int | None = None
) -> None:
    parser.add_argument(name, type=positive, default=default, help=help)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if available)")
    add_count(parser, "--threads", "CPU threads (default: PyTorch's)")


def add_ops(parser: argparse.ArgumentParser) -> None:
    add_choices(parser, "--op", [case.op for case in CASES], "measure only these operators", "OP")


def add_choices(
    parser: argparse.ArgumentParser, name: str, choices: Sequence, help: str, metavar: str
) -> None:
    """Add an option that takes one or more of the choices; by default all of them."""
    help = f"{help}, of {', '.join(map(str, choices))}"
    parser.add_argument(
        name, nargs="+", choices=choices, default=choices, metavar=metavar, help=help
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append every record to FILE, one per line"
    )


def chosen_cases(ops: Sequence[str]) -> list[Case]:
    """Return the cases of --op."""
    return [case for case in CASES if case.op in ops]


def chosen_shape(args: argparse.Namespace, device: str) -> Shape:
    """Return the Shape of --batch, --tokens and --dtype; an option that is None has its default."""
    options = {"B": args.batch, "segments": args.tokens, "dtype": DTYPES.get(args.dtype)}
    return Shape(**{name: value for name, value in options.items() if value}, device=device)


def select_device(args: argparse.Namespace) -> str:
    """Return the device of --device and apply --threads; ValueError if it cannot be used."""
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
        torch.cuda.set_device(name)  # streams and graphs are made on the current device
    return name


def check_writable(path: Path | None, option: str = "--json") -> None:
    """Raise ValueError, before anything is measured, if the folder of a file does not exist."""
    if path and not path.resolve().parent.is_dir():
        raise ValueError(f"{option}: no folder {path.resolve().parent}; make it first")


def make_console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 190)


@contextlib.contextmanager
def show_progress(name: str) -> Iterator[ReportProgress]:
    """Yield a progress callback that is shown as a bar on stderr."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)

        def advance(activity: str, steps: int) -> None:
            bar.update(task, description=activity, total=steps)
            bar.advance(task)

        yield advance
