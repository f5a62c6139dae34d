"""Train deep Diffusion Transformers and analyse their stability."""

# Commands import their modules when they run: help and usage errors need not wait for torch.

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from model import config as configuration
from model.config import Config, UsageError
from model.options import DEFAULT_PRESET, PLACE, make_parser

if TYPE_CHECKING:
    from model.data import Dataset
    from model.nn.dit import DiT
    from model.stability.signals import MetricsRow
    from model.train.checkpoint import CheckpointMeta
    from model.train.runs import Tables

Result = TypeVar("Result")

USAGE_ERROR, COLLAPSED, INTERRUPTED = 2, 3, 130  # exit codes


def train(args: argparse.Namespace) -> int:
    from model.stability.response import Collapsed
    from model.train.loop import train

    config = _read_config(args)
    guard = args.guard or ("stop" if config.probes else "off")
    if args.config and not args.out:
        raise UsageError("--config: also pass the folder of the run, --out RUN")
    out = args.out or Path("runs") / (args.preset or DEFAULT_PRESET)
    with _progress(args.quiet or not sys.stderr.isatty()) as (bar, task):
        report = _TrainingReport(bar, task, args.quiet)
        try:
            last = train(config, out, args.resume, guard, report)
        except Collapsed as error:
            print(f"python -m model train: {error}", file=sys.stderr)
            return COLLAPSED
    if not args.quiet:
        result = "nothing left to do"
        if last:
            loss = math.nan if last["loss"] is None else last["loss"]  # null in metrics.jsonl
            result = f"step {last['step']}, loss {loss:.4f}"
        print(f"{out}: {result}; python -m model sample {out}")
    return 0


class _TrainingReport:
    """Progress bar of a training, or one printed line per line of metrics without a terminal."""

    def __init__(self, bar: Progress, task: TaskID, quiet: bool) -> None:
        self._bar, self._task = bar, task
        self._prints = not quiet and not sys.stderr.isatty()
        self._guard_state: str | None = None

    def __call__(self, step: int, steps: int, metrics: "MetricsRow | None") -> None:
        if metrics:
            if "signals" in metrics and metrics["guard"] != self._guard_state:
                text = f"step {step}: {metrics['guard']}: {'; '.join(metrics['signals'])}"
                self._bar.console.print(text, highlight=False, soft_wrap=True)
            self._guard_state = metrics.get("guard")
            tcs = metrics["layerwise"].get("tcs")
            depth = f" TCS {list(tcs.values())[-1]:.3f}" if tcs else ""
            line = f"loss {metrics['loss']:.3f} |g| {metrics['grad_norm']:.2g}{depth}"
            self._bar.update(self._task, description=line)
            if self._prints:
                print(f"step {step}/{steps} {line}", flush=True)
        self._bar.update(self._task, completed=step, total=steps)


def info(args: argparse.Namespace) -> None:
    from model.info import configuration_table, cost_lines, format_bytes, memory_table
    from model.train import memory
    from model.train.step import choose_device

    config, console = _read_config(args), _make_console()
    measured = memory.measure(config) if args.measure else None  # before this process grows
    cost = memory.plan(config)
    console.print(configuration_table(config))
    for line in cost_lines(config, cost):
        console.print(line, highlight=False)
    console.print(memory_table(config))
    if measured:
        device = choose_device(config.device)
        predicted, (peak, seconds) = cost.peak(host=device.startswith("cpu")), measured
        console.print(
            f"two steps on {device}: peak {format_bytes(peak)}, predicted "
            f"{format_bytes(predicted)}, ratio {peak / predicted:.3f}; {seconds:.3g} s per step",
            highlight=False,
        )


def demo(args: argparse.Namespace) -> None:
    from model import demo
    from model.data import open_dataset

    overrides = configuration.parse_overrides(args.set)
    config = configuration.preset(args.preset, **overrides)
    out = args.out or Path("runs") / f"demo-{args.preset}"
    trivial = demo.trivial_loss(open_dataset(config))
    console = _make_console()
    with Live(console=console, refresh_per_second=4) as live:

        def show(tables: "Tables") -> None:
            live.update(demo.make_table(tables, config.steps, trivial))

        tables = demo.run(args.preset, out, overrides, show)
    picture = out / f"{args.preset}.png"
    demo.draw(tables, config.depth, trivial, picture)
    console.print(f"\nfigure: {picture}", highlight=False)


def diagnose(args: argparse.Namespace) -> None:
    from model.stability import replay

    findings, picture = replay.diagnose(args.trace, args.out, args.json)
    for line in replay.describe(findings):
        print(line)
    print(f"figure: {picture}")


def study(args: argparse.Namespace) -> None:
    from model import studies

    with _progress(not sys.stderr.isatty()) as (bar, task):

        def show(done: int, steps: int) -> None:
            bar.update(task, completed=done, total=steps, description=f"{args.study}, steps")

        results, paths = studies.run(
            args.study, args.out, args.seeds, args.blocks, args.steps, show
        )
    console = _make_console()
    console.print(studies.make_table(results))
    for line in studies.conclusions(results):
        console.print(line, highlight=False)
    console.print(f"written: {', '.join(map(str, paths))}", highlight=False)


def sample(args: argparse.Namespace) -> None:
    from model.evaluate.sample import sample_images, save_grid

    model, dataset, meta, folder = _open_run(args)
    captions = args.caption or dataset.captions(args.n)
    if args.caption and len(args.caption) == 1:
        captions = args.caption * args.n
    stem = f"{folder.name}-seed{args.seed}"
    out = args.out or _unused_path(folder.parent.parent / "samples", stem)
    for path in (out, out.with_suffix(".json")):
        if path.exists():
            raise UsageError(f"--out: {path} exists; choose another")
    seeds = range(args.seed, args.seed + len(captions))
    images = _with_sampling(args, sample_images, model, dataset, captions, seeds)
    save_grid(
        images, captions, out, dataset, seeds=list(seeds), checkpoint=str(folder),
        step=meta.step, average=args.average, integration_steps=args.steps,
        method=args.method, guidance=args.guidance, time_shift=meta.config.time_shift,
        config_hash=meta.config.hash, commit=meta.commit,
    )  # fmt: skip
    print(f"{out}, {out.with_suffix('.json')}")


def evaluate(args: argparse.Namespace) -> None:
    from model.evaluate.caption_match import chance_shares, evaluate_captions

    if args.json and args.json.exists():
        raise UsageError(f"--json: {args.json} exists; choose another")
    model, dataset, meta, folder = _open_run(args)
    shares = _with_sampling(args, evaluate_captions, model, dataset, args.n, args.seed)
    table = Table(title=f"{folder}: share of {args.n} samples that match their caption")
    for name in ("attribute", "share", "by chance"):
        table.add_column(name, justify="left" if name == "attribute" else "right")
    for name, chance in chance_shares().items():
        table.add_row(name, f"{shares[name]:.1%}", f"{chance:.1%}")
    _make_console().print(table)
    if args.json:
        record = {"checkpoint": str(folder), "step": meta.step, "n": args.n, "seed": args.seed,
                  "integration_steps": args.steps, "method": args.method,
                  "guidance": args.guidance, "average": args.average, "shares": shares}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def export(args: argparse.Namespace) -> None:
    from model.train.convert import export

    n = export(args.run_folder, args.out, args.to, "average" if args.average else "model")
    print(f"{args.out}: {n} tensors")


def import_weights(args: argparse.Namespace) -> None:
    from model.train.convert import import_weights

    config = _read_config(args) if args.preset or args.config else None
    overrides = configuration.parse_overrides(args.set)
    print(f"{import_weights(args.file, args.out, config, overrides)}")


def _read_config(args: argparse.Namespace) -> Config:
    """Return the configuration of --config, or of the preset, with --set."""
    overrides = configuration.parse_overrides(args.set)
    if not args.config:
        return configuration.preset(args.preset or DEFAULT_PRESET, **overrides)
    if args.preset:
        raise UsageError(f"expected a preset or a --config, got both: {args.preset}, {args.config}")
    base = dataclasses.asdict(configuration.read(args.config))
    return configuration.from_dict({**base, **overrides})


def _open_run(args: argparse.Namespace) -> "tuple[DiT, Dataset, CheckpointMeta, Path]":
    """Return the model of a run on its device, its data, metadata and checkpoint folder."""
    from model.data import open_dataset
    from model.train import checkpoint
    from model.train.step import prepare

    overrides = configuration.parse_overrides(args.set)
    for name in overrides.keys() - PLACE:
        raise UsageError(
            f"--set: {name} is fixed by the run; only {', '.join(PLACE)} can be changed here"
        )
    folder = checkpoint.find(args.run_folder)
    config = checkpoint.read_meta(folder).config
    config = dataclasses.replace(config, checkpointing="none", **overrides)
    device = prepare(config)
    part = "average" if args.average else "model"
    model, meta, folder = checkpoint.open_run(folder, device, part, **overrides)
    return model, open_dataset(config), meta, folder


def _with_sampling(
    args: argparse.Namespace, function: Callable[..., Result], model: "DiT", *rest: Any
) -> Result:
    """Return function(model, *rest, sampling, progress) with the options and a progress bar."""
    from model.evaluate.sample import Sampling
    from model.train.loop import use_config_backend

    with _progress(not sys.stderr.isatty()) as (bar, task), use_config_backend(model.config):

        def show(done: int, steps: int) -> None:
            bar.update(task, completed=done, total=steps, description="sampling")

        return function(model, *rest, Sampling(args.steps, args.guidance, args.method), show)


def _unused_path(folder: Path, stem: str) -> Path:
    """Return the first of FOLDER/STEM.png, FOLDER/STEM-1.png, ... that does not exist."""
    names = (f"{stem}{'' if i == 0 else f'-{i}'}.png" for i in range(10_000))
    return next(folder / name for name in names if not (folder / name).exists())


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[tuple[Progress, TaskID]]:
    """Show a progress bar on stderr within the block, unless quiet."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=quiet) as bar:
        yield bar, bar.add_task("starting", total=None)


def _make_console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 150)


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "train": train, "info": info, "demo": demo, "diagnose": diagnose, "study": study,
    "sample": sample, "eval": evaluate, "export": export, "import": import_weights,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    args = make_parser(__doc__).parse_args(argv)
    try:
        return COMMANDS[args.command](args) or 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"python -m model {args.command}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(f"python -m model {args.command}: interrupted; saved checkpoints are intact, and the "
              "same command resumes from the last one", file=sys.stderr)  # fmt: skip
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
