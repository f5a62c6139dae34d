"""The training loop, flat: set up, resume, then draw, step, measure, save.

What is random in a step is a function of (seed, step, sample), so a run that is resumed, or whose
batch is split otherwise, sees the same data, noise, times and dropped captions.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import time
from pathlib import Path

import mvsplit_ops as mv
from model import checkpoint, diagnostics
from model import config as configuration
from model.config import FREE_ON_RESUME, UsageError
from model.data import open_dataset
from model.dit import build
from model.optim import Average, learning_rate, make_optimizer
from model.step import draw_batch, gradient_norm, gradients, prepare, update


class Diverged(RuntimeError):
    """The loss or a gradient is not finite."""


def train(config, folder, resume="auto", guard=None, on_step=None):
    """Train to config.steps updates in a run folder; returns the last line of its metrics.

    resume   auto: go on where the run stands, or begin; never: begin; a path: from that checkpoint
    guard    called with a step's metrics before its update; returns go, skip (the update) or stop
    on_step  called with the step, the number of steps, and the metrics or None
    """
    device = prepare(config)
    dataset = open_dataset(config)
    folder = Path(folder)
    start_from = _starting_point(config, folder, resume)
    model = build(config, device)
    optimizer = make_optimizer(model, config)
    average = Average(model, config.ema)
    state = config, dataset.fingerprint, model, optimizer, average
    step = 0
    if start_from is not None:
        step = checkpoint.restore(start_from, *state)
        if _is_of(start_from, folder):
            checkpoint.point_to(start_from)  # also where it is not the newest
    backend = mv_backend(config)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    probes = diagnostics.attach(model) if config.probes else {}
    if config.compile:
        for block in model.blocks:
            if block.probe is None:
                block.compile()
    loader = _Loader(config, dataset, step)

    with _Metrics(config, folder, step) as log, backend, loader:
        while step < config.steps:
            batch = loader.next()
            loss, quarters = gradients(config, model, batch, device)
            norm = gradient_norm(optimizer)
            if not math.isfinite(float(loss + norm)):
                raise Diverged(
                    f"step {step + 1}: loss {float(loss):g}, gradient norm {float(norm):g}; the "
                    "update was not taken and the last checkpoint stands"
                )
            metrics = None
            logged = (step + 1) % config.log_every == 0 or step + 1 == config.steps
            if logged or guard:
                metrics = log.measure(step + 1, loss, norm, quarters, probes)
            verdict = guard(metrics) if guard else "go"
            if verdict == "go":
                update(config, step, optimizer, norm)
                average.update()
            else:
                optimizer.zero_grad(set_to_none=True)
            for probe in probes.values():
                probe.reset()
            step += 1
            if logged or verdict != "go":
                log.write(metrics, loader.waited())
            if on_step:
                on_step(step, config.steps, metrics)
            if verdict == "stop":
                return log.last  # the last checkpoint stands: this state is not worth keeping
            if config.sample_every and step % config.sample_every == 0:
                _sample_grid(config, folder, step, model, dataset, average)
            if config.save_every and step % config.save_every == 0 and step < config.steps:
                checkpoint.save(folder, step, *state)
        if checkpoint.newest_step(folder) != step:
            checkpoint.save(folder, step, *state)
        return log.last


def mv_backend(config):
    """The context in which the operators run on config.backend."""
    if not config.backend:
        return contextlib.nullcontext()
    known = mv.backends()
    if config.backend not in known:
        raise UsageError(f"backend must be one of {', '.join(known)}, got {config.backend!r}")
    return mv.use_backend(config.backend)


def _starting_point(config, folder, resume):
    """The checkpoint to go on from, or None."""
    has_run = (folder / "config.json").is_file()
    if resume not in ("auto", "never"):
        found = checkpoint.find(resume)
        if checkpoint.newest_step(folder) is not None and not _is_of(found, folder):
            raise UsageError(
                f"{folder} holds checkpoints of its own; resume from one of them, or choose "
                "another --out"
            )
    elif has_run and resume == "never":
        raise UsageError(f"{folder} holds a run already; choose another --out, or --resume auto")
    else:
        found = checkpoint.find(folder) if checkpoint.newest_step(folder) is not None else None
    if has_run:
        there = configuration.read(folder / "config.json")
        changed = configuration.differences(there, config, but=FREE_ON_RESUME)
        if changed:
            name, (then, now) = next(iter(changed.items()))
            raise UsageError(
                f"{folder} holds a run with {name}={then}, not {now} ({len(changed)} fields "
                "differ); choose another --out, or pass the same configuration"
            )
    if found is not None:
        checkpoint.read_meta(found)
    return found


def _is_of(found, folder):
    """Is a checkpoint one of the run's in the folder?"""
    return found.resolve().parent == (folder / "checkpoints").resolve()


def _sample_grid(config, folder, step, model, dataset, average):
    from model.sample import sample_images, save_grid

    with average.applied():
        captions = dataset.captions(16)
        images = sample_images(model, dataset, captions, range(16), steps=25, guidance=2.0)
    save_grid(images, captions, folder / "samples" / f"step-{step:08d}.png", dataset)


class _Loader:
    """Batches in order, the next one drawn while a step runs; waited() since it was last asked."""

    def __init__(self, config, dataset, step):
        self._draw = lambda step: draw_batch(config, dataset, step)
        self._steps = iter(range(step, config.steps))
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="data")
        self._seconds = 0.0

    def __enter__(self):
        self._ahead()
        return self

    def __exit__(self, *unused):
        self._pool.shutdown(cancel_futures=True)

    def _ahead(self):
        step = next(self._steps, None)
        self._coming = None if step is None else self._pool.submit(self._draw, step)

    def next(self):
        start = time.perf_counter()
        batch = self._coming.result()
        self._seconds += time.perf_counter() - start
        self._ahead()
        return batch

    def waited(self):
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _Metrics:
    """RUN/metrics.jsonl, a line of strict JSON each time; what is not finite is null."""

    def __init__(self, config, folder, step):
        self.config, self.path, self.last = config, folder / "metrics.jsonl", None
        kept = []
        if self.path.is_file():  # a run that was killed may have gone on after its checkpoint
            kept = [row for row in read_rows(self.path) if row["step"] <= step]
            self.last = kept[-1] if kept else None
        _replace(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._since, self._at = step, time.perf_counter()
        self._board = _tensorboard(folder) if config.tensorboard else None

    def __enter__(self):
        self._file = self.path.open("a")
        return self

    def __exit__(self, *unused):
        self._file.close()
        if self._board:
            self._board.close()

    def measure(self, step, loss, norm, quarters, probes):
        sums, counts = quarters.tolist()
        return {
            "step": step,
            "loss": float(loss),
            "grad_norm": float(norm),
            "lr": learning_rate(self.config, step - 1),
            "loss_by_t": [s / n if n else None for s, n in zip(sums, counts, strict=True)],
            "layerwise": diagnostics.read(probes),
        }

    def write(self, metrics, waited):
        now, steps = time.perf_counter(), metrics["step"] - self._since
        metrics["seconds_per_step"] = (now - self._at) / steps
        metrics["data_seconds_per_step"] = waited / steps
        metrics["samples"] = metrics["step"] * self.config.batch
        self._since, self._at, self.last = metrics["step"], now, metrics
        self._file.write(json.dumps(_finite(metrics), allow_nan=False) + "\n")
        self._file.flush()
        if self._board:
            for name in ("loss", "grad_norm", "lr", "seconds_per_step"):
                self._board.add_scalar(name, metrics[name], metrics["step"])


def read_rows(path):
    """The lines of a metrics.jsonl, without a last one that was cut short."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path, text):
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    os.replace(partial, path)


def _tensorboard(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "tensorboard=true needs the package; run pip install tensorboard"
        ) from error
    return SummaryWriter(folder / "tensorboard")
