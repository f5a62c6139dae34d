"""python -m model <command>: train deep Diffusion Transformers, and look at what they do."""

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
from model.config import UsageError
from model.options import DEFAULT_PRESET, PLACE, parser

INTERRUPTED = 130
COLLAPSED = 3


def train(args):
    from model.stability.response import Collapsed
    from model.train.loop import train

    config = _config(args)
    guard = args.guard or ("stop" if config.probes else "off")
    if args.config and not args.out:
        raise UsageError("--config: name the run's folder too, --out RUN")
    out = args.out or Path("runs") / (args.preset or DEFAULT_PRESET)
    quiet = args.quiet or not sys.stderr.isatty()
    state = None
    with _progress(quiet) as (bar, task):

        def on_step(step, steps, metrics):
            nonlocal state
            if metrics:
                if "signals" in metrics and metrics["guard"] != state:
                    text = f"step {step}: {metrics['guard']}: {'; '.join(metrics['signals'])}"
                    bar.console.print(text, highlight=False, soft_wrap=True)
                state = metrics.get("guard")
                tcs = metrics["layerwise"].get("tcs")
                depth = f" TCS {list(tcs.values())[-1]:.3f}" if tcs else ""
                line = f"loss {metrics['loss']:.3f} |g| {metrics['grad_norm']:.2g}{depth}"
                bar.update(task, description=line)
                if not args.quiet and not sys.stderr.isatty():
                    print(f"step {step}/{steps} {line}", flush=True)
            bar.update(task, completed=step, total=steps)

        try:
            last = train(config, out, args.resume, guard, on_step)
        except Collapsed as error:
            print(f"python -m model train: {error}", file=sys.stderr)
            return COLLAPSED
    if not args.quiet:
        done = "nothing left to do"
        if last:
            loss = math.nan if last["loss"] is None else last["loss"]  # null in metrics.jsonl
            done = f"step {last['step']}, loss {loss:.4f}"
        print(f"{out}: {done}; python -m model sample {out}")
    return 0


def info(args):
    from model.info import configuration_table, cost_lines, memory_table, size
    from model.train import memory

    config, console = _config(args), _console()
    measured = memory.measure(config) if args.measure else None
    console.print(configuration_table(config))
    here = memory.plan(config)
    for line in cost_lines(config, here):
        console.print(line, highlight=False)
    console.print(memory_table(config))
    if measured:
        from model.train.step import choose_device

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


def diagnose(args):
    from model.stability import replay

    found, picture = replay.diagnose(args.trace, args.out, args.json)
    for line in replay.report(found):
        print(line)
    print(f"picture: {picture}")


def study(args):
    from model import studies

    quiet = not sys.stderr.isatty()
    with _progress(quiet) as (bar, task):

        def show(done, steps):
            bar.update(task, completed=done, total=steps, description=f"{args.study}, steps")

        results, paths = studies.run(
            args.study, args.out, args.seeds, args.blocks, args.steps, show
        )  # fmt: skip
    console = _console()
    console.print(studies.table(results))
    for line in studies.conclusions(results):
        console.print(line, highlight=False)
    console.print(f"written: {', '.join(map(str, paths))}", highlight=False)


def sample(args):
    from model.evaluate.sample import sample_images, save_grid

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
    from model.evaluate.caption_match import by_chance, conditioning

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
    from model.train.convert import export

    n = export(args.run_folder, args.out, args.to, "average" if args.average else "model")
    print(f"{args.out}: {n} tensors")


def import_(args):
    from model.train.convert import import_weights

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
    from model.data import open_dataset
    from model.train import checkpoint
    from model.train.step import prepare

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
    from model.train.loop import mv_backend

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


COMMANDS = {
    "train": train, "info": info, "demo": demo, "diagnose": diagnose, "study": study,
    "sample": sample, "eval": evaluate, "export": export, "import": import_,
}  # fmt: skip


def main(argv=None):
    args = parser(__doc__).parse_args(argv)
    try:
        return COMMANDS[args.command](args) or 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"python -m model {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"python -m model {args.command}: interrupted; what was saved stands, "
              "the same command goes on from it", file=sys.stderr)  # fmt: skip
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
