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

import torch

import mvsplit_ops as mv
from model import config as configuration
from model.config import FREE_ON_BRANCH, FREE_ON_RESUME, UsageError
from model.data import open_dataset
from model.nn.dit import build
from model.stability.response import supervise
from model.stability.taps import Recorder
from model.stability.trace import read_rows
from model.train import checkpoint
from model.train.optim import Average, learning_rate, make_optimizer
from model.train.step import draw_batch, gradient_norms, gradients, prepare, update


class Diverged(RuntimeError):
    """The loss or a gradient is not finite."""


def train(config, folder, resume="auto", guard="off", on_step=None):
    """Train to config.steps updates in a run folder; returns the last line of its metrics.

    resume   auto: go on where the run stands, or begin; never: begin; a path: from that checkpoint
    guard    off, warn, stop or skip (model.collapse); or a function that is called with each step's
             metrics before its update and returns go, skip (the update) or stop
    on_step  called with the step, the number of steps, and the metrics or None

    Raises Collapsed where the guard stops the run, Diverged where a loss or gradient is not finite.
    """
    device = prepare(config)
    dataset = open_dataset(config)
    folder = Path(folder)
    start_from = _starting_point(config, folder, resume)
    model = build(config, device)
    optimizer = make_optimizer(model, config)
    recorder = Recorder(model, optimizer, config.probes, config.log_every)
    guard = supervise(guard, config, folder, recorder.history)
    average = Average(model, config.ema)
    state = config, dataset.fingerprint, model, optimizer, average
    step, branch = 0, False
    if start_from is not None:
        branch = not _is_of(start_from, folder)
        step = checkpoint.restore(start_from, *state, FREE_ON_BRANCH if branch else FREE_ON_RESUME)
        guard.restore(start_from, step, checkpoint.read_guard(start_from), branch)
        if not branch:
            checkpoint.point_to(start_from)  # also where it is not the newest
    backend = mv_backend(config)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    if config.compile:
        for block in model.blocks:
            block.compile()
    loader = _Loader(config, dataset, step)

    with _Metrics(config, folder, step) as log, backend, loader:
        save_due = False
        if branch:
            checkpoint.save(folder, step, *state, guard)  # what it goes on from if it is broken off
        while step < config.steps:
            batch = loader.next()
            step += 1
            recorder.begin(step)
            loss, quarters = gradients(config, model, batch, device)
            norms = gradient_norms(optimizer)
            norm = norms.norm()
            recorder.record(step, loss, norms, quarters)
            logged = step % config.log_every == 0 or step == config.steps
            metrics = recorder.rows()[-1] if logged or guard.reads else None
            verdict = _verdict(guard, step, metrics, loss, norm)
            if verdict == "go":
                update(config, step - 1, optimizer, norm)
                average.update()
            else:
                optimizer.zero_grad(set_to_none=True)
            written = logged or verdict != "go" or guard.alert
            if written:
                log.write(metrics, loader.waited())
            if on_step:
                on_step(step, config.steps, metrics if written else None)
            if verdict == "stop":
                guard.end()
                return log.last  # the last checkpoint stands: this state is not worth keeping
            if config.sample_every and step % config.sample_every == 0:
                _sample_grid(config, folder, step, model, dataset, average)
            save_due |= config.save_every > 0 and step % config.save_every == 0
            if save_due and guard.may_save and step < config.steps:
                checkpoint.save(folder, step, *state, guard)
                save_due = False
        if checkpoint.newest_step(folder) != step:
            checkpoint.save(folder, step, *state, guard)
        return log.last


def _verdict(guard, step, metrics, loss, norm):
    """Of the guard: go, skip or stop. The numbers are on the host already where metrics are."""
    if metrics:
        loss, norm = metrics["loss"], metrics["grad_norm"]
    else:
        loss, norm = torch.stack((loss, norm.to(loss))).tolist()
    if math.isfinite(loss + norm):
        return guard(metrics)
    if guard.not_finite(metrics) == "skip":
        return "skip"
    raise Diverged(
        f"step {step}: loss {loss:g}, gradient norm {norm:g}; the update was not taken and the "
        "last checkpoint stands"
    )


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
    from model.evaluate.sample import sample_images, save_grid

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

    def write(self, metrics, waited):
        now, steps = time.perf_counter(), metrics["step"] - self._since
        metrics["lr"] = learning_rate(self.config, metrics["step"] - 1)
        metrics["seconds_per_step"] = (now - self._at) / steps
        metrics["data_seconds_per_step"] = waited / steps
        metrics["samples"] = metrics["step"] * self.config.batch
        self._since, self._at, self.last = metrics["step"], now, metrics
        self._file.write(json.dumps(_finite(metrics), allow_nan=False) + "\n")
        self._file.flush()
        if self._board:
            for name in ("loss", "grad_norm", "lr", "seconds_per_step"):
                self._board.add_scalar(name, metrics[name], metrics["step"])


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
