"""Measure the operators and whole optimizer steps on this machine."""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from bench.common import machine, options
from bench.common.accuracy import Inaccurate
from bench.measure import profile, run_all, sweep, train_step
from bench.report import write
from bench.static import kernel_resources, predict, traffic

# name: (module with add_options and run_command, whose docstring is the description; summary)
COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "profile": (profile, "the paper's operator profile on this machine"),
    "ops": (sweep, "a sweep of every operator over shapes, compared with every peer"),
    "step": (train_step, "whole optimizer steps: breakdown, backends and policies compared"),
    "machine": (machine, "peak rates of this machine: copy bandwidth, matrix products"),
    "traffic": (traffic, "bytes that each operator moves, counted; no GPU needed"),
    "resources": (
        kernel_resources,
        "registers, spills, shared memory, occupancy of compiled kernels; no GPU needed",
    ),
    "predict": (predict, "estimated time of a step, compared with measurements; no GPU needed"),
    "report": (write, "tables and plots of the records, as Markdown and HTML; README figures"),
    "device": (run_all, "everything that a new GPU machine should record, within minutes"),
}


def make_parser() -> argparse.ArgumentParser:
    top = _Parser(prog="python -m bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        parser = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=_Formatter
        )
        module.add_options(parser)
        parser.set_defaults(run=module.run_command)
    return top


class _Parser(argparse.ArgumentParser):
    """Prints an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions, and adds an option's default unless its help has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        options.check_writable(getattr(args, "json", None))
        return args.run(args) or 0
    except (ValueError, RuntimeError, Inaccurate) as error:
        message, code = str(error), 2
    except KeyboardInterrupt:
        message, code = "interrupted; the records written so far are saved", 130
    print(f"python -m bench {args.command}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
