"""python -m bench <command>: measure the operators here, and write the README's figures."""

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import compiled, report, step, traffic
from bench.accuracy import Inaccurate
from bench.cases import CASES, Shape
from bench.profile import measure
from model.__main__ import positive
from model.config import CONTENDERS, PRESETS, parse_overrides
from mvsplit_ops import _backends
from mvsplit_ops.__main__ import DTYPES


def token_counts(text):
    return tuple(positive(part) for part in text.replace("+", ",").split(","))


def _add_shape(command):
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


def _add_ops(command):
    ops = [case.op for case in CASES]
    command.add_argument(
        "--op",
        nargs="+",
        choices=ops,
        default=ops,
        metavar="OP",
        help="these alone",
    )


def _add_json(command):
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="add the record to FILE, one a line"
    )


def parser():
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    p = commands.add_parser(
        "profile",
        help="the paper's operator profile on this machine",
        description="Times every operator in eager PyTorch, torch.compile and fused, after "
        "checking that each is right, and adds up one optimizer step.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--blocks", type=positive, default=400, help="blocks, 3/4 of them checkpointed")
    _add_shape(p)
    p.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    p.add_argument("--backend", choices=_backends.BACKENDS, help="fused column (default: device's)")
    p.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's)")
    p.add_argument(
        "--repeats", type=positive, default=30, help="timed calls of each implementation"
    )
    _add_json(p)
    p.set_defaults(run=profile)
    t = commands.add_parser(
        "traffic",
        help="bytes that each operator moves on each backend, counted; no GPU needed",
        description="Counts the bytes that an operator loads and stores: of Triton kernels in "
        "Triton's interpreter, of eager PyTorch at its dispatcher. Some minutes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_shape(t)
    _add_ops(t)
    _add_json(t)
    t.set_defaults(run=count_traffic)
    c = commands.add_parser(
        "compile",
        help="registers, spills and access widths of the Triton kernels; no GPU needed",
        description="Compiles every Triton kernel at a shape and reads the machine code.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_shape(c)
    _add_ops(c)
    c.add_argument(
        "--arch",
        nargs="+",
        type=int,
        choices=compiled.KNOWN_ARCHITECTURES,
        metavar="N",
        default=compiled.ARCHITECTURES,
        help="compute capabilities: 80 A100, 86, 89, 90 H100, 100 B200, 120",
    )
    c.set_defaults(run=compile_kernels)
    s = commands.add_parser(
        "step",
        help="whole optimizer steps of the model, backends and residuals in turn",
        description="Times optimizer steps of a preset of python -m model, every backend with "
        "every residual, taking turns in one process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    s.add_argument("preset", nargs="?", choices=PRESETS, default="collapse100")
    s.add_argument(
        "--backend",
        nargs="+",
        choices=_backends.BACKENDS,
        default=["cpu", "reference"],
        metavar="BACKEND",
    )
    s.add_argument(
        "--residual",
        nargs="+",
        choices=CONTENDERS,
        default=["mvsplit"],
        metavar="RESIDUAL",
        help=", ".join(CONTENDERS),
    )
    s.add_argument("--repeats", type=positive, default=5, help="timed steps of each")
    s.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of the preset; python -m model train --help lists them",
    )
    _add_json(s)
    s.set_defaults(run=time_steps)
    r = commands.add_parser(
        "report",
        help="write the README's table and picture",
        description="Generates the README's table and picture from bench/results/*.jsonl.",
    )
    r.set_defaults(run=lambda args: report.write_readme())
    return top


def profile(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = _shape(args, _usable(device))
    _writable(args.json)
    with _progress("profile") as progress:
        result = measure(shape, args.blocks, args.repeats, args.backend, progress)
    report.print_table(result, _console())
    if args.json:
        report.append_json(result.to_json(), args.json)


def time_steps(args):
    _writable(args.json)
    overrides = parse_overrides(args.set)
    with _progress("step") as progress:
        result = step.measure(
            args.preset, overrides, args.residual, args.backend, args.repeats, progress
        )
    _console().print(step.table(result))
    if args.json:
        report.append_json(result.to_json(), args.json)


def count_traffic(args):
    shape = _shape(args, "cpu")
    _writable(args.json)
    with _progress("traffic") as progress:
        result = traffic.measure(shape, progress, _chosen(args.op))
    _console().print(report.traffic_table(result))
    if args.json:
        report.append_json(result.to_json(), args.json)


def compile_kernels(args):
    with _progress("compile") as progress:
        kernels = compiled.measure(_shape(args, "meta"), args.arch, progress, _chosen(args.op))
    _console().print(report.kernel_table(kernels))


def _chosen(ops):
    return [case for case in CASES if case.op in ops]


def _shape(args, device):
    return Shape(B=args.batch, segments=args.tokens, dtype=DTYPES[args.dtype], device=device)


def _writable(path):
    if path and not path.resolve().parent.is_dir():
        raise ValueError(f"--json: no folder {path.resolve().parent}; make it first")


def _console():
    return Console(width=None if sys.stdout.isatty() else 190)


@contextlib.contextmanager
def _progress(name):
    """progress(what is done now, steps in all), shown as a bar on stderr."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)

        def progress(what, steps):
            bar.update(task, description=what, total=steps)
            bar.advance(task)

        yield progress


def _usable(device):
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device: must be cpu, cuda or cuda:N, got {device!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: cannot use {device!r} here: {reason}") from error
    return device


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, RuntimeError, Inaccurate) as error:
        print(f"python -m bench {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
