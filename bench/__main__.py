"""Measure the operators and whole optimizer steps, on the machine in front of you."""

import argparse
import importlib
import sys

from bench.common.accuracy import Inaccurate

# A command is a module: its docstring describes it, options(parser) adds its options and
# command(args) runs it.
MODULES = {
    "profile": "bench.measure.profile",
    "ops": "bench.measure.sweep",
    "step": "bench.measure.train_step",
    "machine": "bench.common.machine",
    "traffic": "bench.static.traffic",
    "resources": "bench.static.kernel_resources",
    "predict": "bench.static.predict",
    "report": "bench.report.write",
    "device": "bench.measure.run_all",
}
COMMANDS = {
    "profile": "the paper's operator profile on this machine",
    "ops": "every operator over a sweep of shapes, beside every peer",
    "step": "whole optimizer steps: where their time goes, backends and policies side by side",
    "machine": "what this machine can do at best: copy bandwidth, rate of matrix products",
    "traffic": "bytes that each operator moves, counted; no GPU needed",
    "resources": "registers, spills, shared memory, occupancy of compiled kernels; no GPU needed",
    "predict": "milliseconds of a step by calculation, beside what was measured; no GPU needed",
    "report": "tables and plots of the records, as Markdown and HTML; the README's figures",
    "device": "all that a fresh GPU machine should record, within some minutes",
}


def parser():
    top = _Parser(prog="python -m bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(MODULES[name])
        p = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=_Formatter,
        )
        module.options(p)
        p.set_defaults(run=module.command)
    return top


class _Parser(argparse.ArgumentParser):
    """An error is one line, which lists what there is."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help tells more\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written; the default of an option told once, where there is one."""

    def _get_help_string(self, action):
        if action.default in (None, False, []) or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, RuntimeError, Inaccurate) as error:
        print(f"python -m bench {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"python -m bench {args.command}: interrupted; what was recorded so far is kept",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
