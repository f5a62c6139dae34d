"""python -m model <command>: train deep Diffusion Transformers, and look at what they do."""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from model import config as configuration
from model.config import FIELDS, PRESETS, UsageError

INTERRUPTED = 130
DEFAULT_PRESET = "tiny"
PLACE = ("device", "threads", "backend", "data_path")  # what does not change what a run means


def parser():
    top = argparse.ArgumentParser(prog="python -m model", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    p = _command(commands, "train", train, "train a model, or go on with a run")
    _add_config(p)
    p.add_argument("--out", type=Path, metavar="RUN", help="its folder (default: runs/PRESET)")
    p.add_argument("--resume", default="auto", metavar="auto|never|PATH",
                   help="auto: go on where the run stands; never: begin; or from a checkpoint "
                   "(default: %(default)s)")  # fmt: skip
    p.add_argument("--quiet", action="store_true", help="no progress on the terminal")

    p = _command(commands, "info", info, "parameters, FLOPs and memory, before allocating any")
    _add_config(p)
    p.add_argument(
        "--measure",
        action="store_true",
        help="take two real steps here and set their memory beside the prediction",
    )

    p = _command(commands, "demo", demo, "watch a collapse: three residuals side by side, CPU")
    p.add_argument("preset", nargs="?", default="collapse100",
                   choices=[n for n in PRESETS if n.startswith("collapse")])  # fmt: skip
    _add_set(p)
    p.add_argument("--out", type=Path, metavar="DIR", help="(default: runs/demo-PRESET)")

    p = _command(commands, "sample", sample, "images from a run, a PNG grid and how it was made")
    _add_run(p)
    p.add_argument("--caption", nargs="+", metavar="TEXT", help="(default: n different ones)")
    p.add_argument("-n", type=positive, default=16, help="images (default: %(default)s)")
    _add_sampling(p)
    p.add_argument("--out", type=Path, metavar="FILE.png", help="(default: in the run's samples/)")

    p = _command(commands, "eval", evaluate, "share of samples that match their captions (shapes)")
    _add_run(p)
    p.add_argument("-n", type=positive, default=64, help="images (default: %(default)s)")
    _add_sampling(p)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the shares here too")

    p = _command(commands, "export", export, "write a run's weights to a file")
    _add_run(p)
    p.add_argument(
        "--to",
        required=True,
        choices=("official", "safetensors"),
        help="official: the published model.pt; safetensors: with the configuration",
    )
    p.add_argument("--out", type=Path, required=True, metavar="FILE")

    p = _command(commands, "import", import_, "make a run of a file of weights, strictly")
    p.add_argument("file", type=Path, help="model.pt of the published layout, or .safetensors")
    _add_config(p, default=None)
    p.add_argument("--out", type=Path, required=True, metavar="RUN")
    return top


def _command(commands, name, run, help):
    p = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    p.set_defaults(run=run)
    return p


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


def train(args):
    from model.train import train

    config = _config(args)
    if args.config and not args.out:
        raise UsageError("--config: name the run's folder too, --out RUN")
    out = args.out or Path("runs") / (args.preset or DEFAULT_PRESET)
    quiet = args.quiet or not sys.stderr.isatty()
    with _progress(quiet) as (bar, task):

        def on_step(step, steps, metrics):
            if metrics:
                tcs = metrics["layerwise"].get("tcs")
                depth = f" TCS {list(tcs.values())[-1]:.3f}" if tcs else ""
                line = f"loss {metrics['loss']:.3f} |g| {metrics['grad_norm']:.2g}{depth}"
                bar.update(task, description=line)
                if not args.quiet and not sys.stderr.isatty():
                    print(f"step {step}/{steps} {line}", flush=True)
            bar.update(task, completed=step, total=steps)

        last = train(config, out, args.resume, on_step=on_step)
    if not args.quiet:
        done = f"step {last['step']}, loss {last['loss']:.4f}" if last else "nothing left to do"
        print(f"{out}: {done}; python -m model sample {out}")


def info(args):
    from model import plan
    from model.info import configuration_table, cost_lines, memory_table, size

    config, console = _config(args), _console()
    measured = plan.measure(config) if args.measure else None
    console.print(configuration_table(config))
    here = plan.plan(config)
    for line in cost_lines(config, here):
        console.print(line, highlight=False)
    console.print(memory_table(config))
    if measured:
        from model.step import choose_device

        device = choose_device(config.device)
        expected, (peak, seconds) = here.peak(host=device.startswith("cpu")), measured
        console.print(
            f"two steps on {device}: peak {size(peak)}, predicted {size(expected)}, "
            f"ratio {peak / expected:.3f}; {seconds:.3g} s a step",
            highlight=False,
        )


def demo(args):
    from model import demo as demonstration
    from model.data import open_dataset

    overrides = configuration.parse_overrides(args.set)
    config = configuration.preset(args.preset, **overrides)
    out = args.out or Path("runs") / f"demo-{args.preset}"
    trivial = demonstration.trivial_loss(open_dataset(config))
    console = _console()
    with Live(console=console, refresh_per_second=4) as live:

        def show(table):
            live.update(_demo_table(demonstration, table, config, trivial))

        table = demonstration.run(args.preset, out, overrides, show)
    picture = out / f"{args.preset}.png"
    demonstration.figure(table, config.depth, trivial, picture)
    console.print(f"\nfigure: {picture}", highlight=False)


def _demo_table(demonstration, table, config, trivial):
    view = Table(caption=f"loss: mean of {demonstration.SMOOTH} steps; predicting nothing: "
                 f"{trivial:.3f}. The rest: last block, last step.")  # fmt: skip
    columns = ("residual", "step", "loss", "TCS", "rho", "G_mean/G_ctr", "s/step", "")
    for name in columns:
        view.add_column(name, justify="left" if name == "residual" else "right")
    for name, rows in table.items():
        if not rows:
            view.add_row(name, "waits", *[""] * 6)
            continue
        loss, tcs, rho, ratio, seconds, verdict = demonstration.summary(name, rows)
        step = f"{rows[-1]['step']}/{config.steps}"
        figures = [f"{loss:.3f}", f"{tcs:.4f}", *("inf" if v is None else f"{v:.3g}" for v in (rho, ratio))]  # fmt: skip  # noqa: E501
        view.add_row(name, step, *figures, f"{seconds:.3f}", verdict)
    return view


def sample(args):
    from model.sample import sample_images, save_grid

    model, dataset, meta, folder = _open(args)
    captions = args.caption or dataset.captions(args.n)
    if args.caption and len(args.caption) == 1:
        captions = args.caption * args.n
    out = args.out or _free(folder.parent.parent / "samples", f"{folder.name}-seed{args.seed}")
    for path in (out, out.with_suffix(".json")):
        if path.exists():
            raise UsageError(f"--out: {path} exists; choose another")
    seeds = range(args.seed, args.seed + len(captions))
    images = _sampled(args, sample_images, model, dataset, captions, seeds)
    save_grid(
        images, captions, out, dataset, seeds=list(seeds), checkpoint=str(folder),
        step=meta["step"], average=args.average, integration_steps=args.steps,
        method=args.method, guidance=args.guidance, time_shift=meta["config"].time_shift,
        config_hash=meta["config"].hash, commit=meta["commit"],
    )  # fmt: skip
    print(f"{out}, {out.with_suffix('.json')}")


def evaluate(args):
    from model.evaluate import by_chance, conditioning

    if args.json and args.json.exists():
        raise UsageError(f"--json: {args.json} exists; choose another")
    model, dataset, meta, folder = _open(args)
    shares = _sampled(args, conditioning, model, dataset, args.n, args.seed)
    table = Table(title=f"{folder}: samples that match their caption, of {args.n}")
    for name in ("attribute", "share", "by chance"):
        table.add_column(name, justify="left" if name == "attribute" else "right")
    for name, share in shares.items():
        table.add_row(name, f"{share:.1%}", f"{by_chance()[name]:.1%}")
    _console().print(table)
    if args.json:
        record = {"checkpoint": str(folder), "step": meta["step"], "n": args.n, "seed": args.seed,
                  "integration_steps": args.steps, "method": args.method,
                  "guidance": args.guidance, "average": args.average, "shares": shares}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def export(args):
    from model.convert import export

    n = export(args.run_folder, args.out, args.to, "average" if args.average else "model")
    print(f"{args.out}: {n} tensors")


def import_(args):
    from model.convert import import_weights

    config = _config(args) if args.preset or args.config else None
    overrides = configuration.parse_overrides(args.set)
    print(f"{import_weights(args.file, args.out, config, overrides)}")


def _config(args):
    overrides = configuration.parse_overrides(args.set)
    if not args.config:
        return configuration.preset(args.preset or DEFAULT_PRESET, **overrides)
    if args.preset:
        raise UsageError(f"name a preset or a --config, not both: {args.preset}, {args.config}")
    base = dataclasses.asdict(configuration.read(args.config))
    return configuration.from_dict({**base, **overrides})


def _open(args):
    """Model, data, meta and folder of a run, on its device."""
    from model import checkpoint
    from model.data import open_dataset
    from model.step import prepare

    overrides = configuration.parse_overrides(args.set)
    for name in overrides.keys() - PLACE:
        raise UsageError(f"--set: {name} is the run's; here one may set {', '.join(PLACE)}")
    folder = checkpoint.find(args.run_folder)
    config = checkpoint.read_meta(folder)["config"]
    config = dataclasses.replace(config, checkpointing="none", **overrides)
    device = prepare(config)
    part = "average" if args.average else "model"
    model, meta, folder = checkpoint.open_run(folder, device, part, **overrides)
    return model, open_dataset(config), meta, folder


def _sampled(args, function, model, dataset, *rest):
    """Call a function that samples, with the arguments of _add_sampling and a bar."""
    from model.train import mv_backend

    with _progress(not sys.stderr.isatty()) as (bar, task), mv_backend(model.config):
        return function(
            model, dataset, *rest, steps=args.steps, guidance=args.guidance, method=args.method,
            progress=lambda i, n: bar.update(task, completed=i, total=n, description="sampling"),
        )  # fmt: skip


def _free(folder, stem):
    """The first unused FOLDER/STEM[-N].png."""
    names = (f"{stem}{'' if i == 0 else f'-{i}'}.png" for i in range(10_000))
    return next(folder / name for name in names if not (folder / name).exists())


class _progress:
    """(bar, task) within the block; quiet: nothing is shown."""

    def __init__(self, quiet):
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        self.bar = Progress(
            *columns, TimeElapsedColumn(), console=Console(stderr=True), disable=quiet
        )

    def __enter__(self):
        self.bar.start()
        return self.bar, self.bar.add_task("starting", total=None)

    def __exit__(self, *unused):
        self.bar.stop()


def _console():
    return Console(width=None if sys.stdout.isatty() else 150)


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"python -m model {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"python -m model {args.command}: interrupted; what was saved stands, "
              "the same command goes on from it", file=sys.stderr)  # fmt: skip
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
