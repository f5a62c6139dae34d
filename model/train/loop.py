"""The training loop: set up, resume, then draw, compute gradients, judge, update, save.

Random numbers are a function of (seed, step, sample). A resumed run, or one whose batch is split
differently, therefore sees the same data, noise, times and dropped captions.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

import mvsplit_ops as mv
from model import config as configuration
from model.config import FREE_ON_BRANCH, FREE_ON_RESUME, Config, UsageError
from model.data import Dataset, open_dataset
from model.evaluate.sample import sample_images, save_grid
from model.nn.dit import DiT, build
from model.stability.response import Action, GuardFunction, Unguarded, supervise
from model.stability.signals import MetricsRow
from model.stability.taps import Recorder
from model.stability.trace import read_rows
from model.train import checkpoint
from model.train.checkpoint import TrainingState
from model.train.optim import Average, learning_rate, make_optimizer
from model.train.step import (
    Batch,
    compute_gradients,
    draw_batch,
    gradient_norms,
    prepare,
    update,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SAMPLES_PER_GRID = 16

OnStep: TypeAlias = Callable[[int, int, MetricsRow | None], None]


class Diverged(RuntimeError):
    """The loss or a gradient is NaN or infinity."""


def train(
    config: Config,
    folder: str | Path,
    resume: str = "auto",
    guard: str | GuardFunction | None = "off",
    on_step: OnStep = lambda step, steps, metrics: None,
) -> MetricsRow | None:
    """Train to config.steps updates in a run folder; return the last line of its metrics.

    resume   auto: resume the run if it exists; never: start from scratch; or a checkpoint's path
    guard    off, warn, stop or skip (model.stability.response); or a function that is called with
             the metrics of each step before its update and returns "go", "skip" or "stop"
    on_step  called with the step, the number of steps, and the metrics if they were written

    Raises Collapsed if the guard stops the run, Diverged if a loss or gradient is NaN or infinity.
    """
    folder, device, dataset = Path(folder), prepare(config), open_dataset(config)
    start = _starting_point(config, folder, resume)
    model = build(config, device)
    optimizer, average = make_optimizer(model, config), Average(model, config.ema)
    recorder = Recorder(model, optimizer, config.probes, config.log_every)
    supervisor = supervise(guard, config, folder, recorder.history)
    state = TrainingState(config, dataset.fingerprint, model, optimizer, average)
    step, is_branch = _restore(start, folder, state, supervisor)
    backend = use_config_backend(config)
    _begin_run(folder, state)
    if is_branch:
        checkpoint.save(folder, step, state, supervisor)  # an interrupted run resumes from here
    log, loader = _MetricsLog(config, folder, step), _Loader(config, dataset, step)
    with backend, log, loader:
        save_due = False
        while step < config.steps:
            step += 1
            recorder.begin(step)
            loss, quarters = compute_gradients(config, model, loader.next(), device)
            norms = gradient_norms(optimizer)
            norm = norms.norm()
            recorder.record(step, loss, norms, quarters)
            logged = step % config.log_every == 0 or step == config.steps
            metrics = recorder.rows()[-1] if logged or supervisor.needs_metrics else None
            action = _judge(supervisor, step, metrics, loss, norm)
            if action == "go":
                update(config, step - 1, optimizer, norm)
                average.update()
            else:
                optimizer.zero_grad(set_to_none=True)
            written = metrics if logged or action != "go" or supervisor.alert else None
            if written:
                log.write(written, loader.take_wait_seconds())
            on_step(step, config.steps, written)
            if action == "stop":
                supervisor.end()
                return log.last  # without a checkpoint: this state is not worth keeping
            if config.sample_every and step % config.sample_every == 0:
                _save_sample_grid(config, folder, step, model, dataset, average)
            save_due |= config.save_every > 0 and step % config.save_every == 0
            if step == config.steps or (save_due and supervisor.may_save):
                checkpoint.save(folder, step, state, supervisor)
                save_due = False
        return log.last


def _judge(
    supervisor: Unguarded, step: int, metrics: MetricsRow | None, loss: Tensor, norm: Tensor
) -> Action:
    """Return the supervisor's action for a step; Diverged if it cannot be skipped."""
    if metrics:  # these numbers are on the host already
        loss_value, norm_value = metrics["loss"], metrics["grad_norm"]
    else:
        loss_value, norm_value = torch.stack((loss, norm.to(loss))).tolist()
    if math.isfinite(loss_value + norm_value):
        return supervisor(metrics)
    if supervisor.on_non_finite(metrics) == "skip":
        return "skip"
    raise Diverged(
        f"step {step}: loss {loss_value:g}, gradient norm {norm_value:g}; the update was not "
        "taken. The last checkpoint is intact: start a new run from it with a lower lr, --resume "
        "CHECKPOINT --out NEW --set lr=..."
    )


def use_config_backend(config: Config) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which the operators run on config.backend."""
    if not config.backend:
        return contextlib.nullcontext()
    known = mv.backends()
    if config.backend not in known:
        raise UsageError(f"backend must be one of {', '.join(known)}, got {config.backend!r}")
    return mv.use_backend(config.backend)


def _starting_point(config: Config, folder: Path, resume: str) -> Path | None:
    """Return the checkpoint to start from, or None."""
    start: Path | None = None
    has_run = (folder / "config.json").is_file()
    has_checkpoint = checkpoint.newest_step(folder) is not None
    if resume not in ("auto", "never"):
        start = checkpoint.find(resume)
        if has_checkpoint and not _belongs_to(start, folder):
            raise UsageError(
                f"{folder} has checkpoints of its own; resume from one of them, or choose another "
                "--out"
            )
    elif has_run and resume == "never":
        raise UsageError(f"{folder} already contains a run; choose another --out, or --resume auto")
    elif has_checkpoint:
        start = checkpoint.find(folder)
    if has_run:
        previous = configuration.read(folder / "config.json")
        changed = configuration.differences(previous, config, ignored=FREE_ON_RESUME)
        if changed:
            name, (then, now) = next(iter(changed.items()))
            raise UsageError(
                f"{folder} contains a run with {name}={then}, not {now} ({len(changed)} fields "
                "differ); choose another --out, or pass the same configuration"
            )
    if start is not None:
        checkpoint.read_meta(start)  # checks that it is complete
    return start


def _belongs_to(start: Path, folder: Path) -> bool:
    """Return whether a checkpoint is one of the run in a folder."""
    return start.resolve().parent == (folder / "checkpoints").resolve()


def _restore(
    start: Path | None, folder: Path, state: TrainingState, supervisor: Unguarded
) -> tuple[int, bool]:
    """Restore the state from a checkpoint, if any.

    Returns the step, and whether this is a branch: a new run that starts from another run.
    """
    if start is None:
        return 0, False
    is_branch = not _belongs_to(start, folder)
    step = checkpoint.restore(start, state, FREE_ON_BRANCH if is_branch else FREE_ON_RESUME)
    supervisor.restore(start, step, checkpoint.read_guard(start), is_branch)
    if not is_branch:
        checkpoint.point_to(start)  # it need not be the newest
    return step, is_branch


def _begin_run(folder: Path, state: TrainingState) -> None:
    """Write the configuration of a run, and compile its blocks if config.compile is set."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "config.json", json.dumps(dataclasses.asdict(state.config), indent=1) + "\n")
    if state.config.compile:
        for block in state.model.blocks:
            block.compile()


def _save_sample_grid(
    config: Config, folder: Path, step: int, model: DiT, dataset: Dataset, average: Average
) -> None:
    captions = dataset.captions(SAMPLES_PER_GRID)
    with average.applied():
        images = sample_images(model, dataset, captions, range(SAMPLES_PER_GRID))
    save_grid(images, captions, folder / "samples" / f"step-{step:08d}.png", dataset)


class _Loader:
    """Batches in order; the next one is drawn by a thread while a step runs."""

    def __init__(self, config: Config, dataset: Dataset, step: int) -> None:
        self._draw = lambda step: draw_batch(config, dataset, step)
        self._steps = iter(range(step, config.steps))
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="data")
        self._wait_seconds = 0.0

    def __enter__(self) -> "_Loader":
        self._submit_next()
        return self

    def __exit__(self, *unused: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit_next(self) -> None:
        step = next(self._steps, None)
        self._pending = None if step is None else self._pool.submit(self._draw, step)

    def next(self) -> Batch:
        assert self._pending is not None
        start = time.perf_counter()
        batch = self._pending.result()
        self._wait_seconds += time.perf_counter() - start
        self._submit_next()
        return batch

    def take_wait_seconds(self) -> float:
        """Return the time spent waiting for batches since the last call."""
        seconds, self._wait_seconds = self._wait_seconds, 0.0
        return seconds


class _MetricsLog:
    """RUN/metrics.jsonl with one line of strict JSON per step; NaN and infinity become null.

    last   the last line, or None
    """

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        self.config, self.path = config, folder / "metrics.jsonl"
        rows: list[MetricsRow] = []
        if self.path.is_file():  # a killed run may have written lines after its last checkpoint
            rows = [row for row in read_rows(self.path) if row["step"] <= step]
        self.last = rows[-1] if rows else None
        _replace(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._last_step, self._last_time = step, time.perf_counter()
        self._board = _open_tensorboard(folder) if config.tensorboard else None

    def __enter__(self) -> "_MetricsLog":
        self._file = self.path.open("a")
        return self

    def __exit__(self, *unused: object) -> None:
        self._file.close()
        if self._board:
            self._board.close()

    def write(self, metrics: MetricsRow, wait_seconds: float) -> None:
        now, steps = time.perf_counter(), metrics["step"] - self._last_step
        metrics["lr"] = learning_rate(self.config, metrics["step"] - 1)
        metrics["seconds_per_step"] = (now - self._last_time) / steps
        metrics["data_seconds_per_step"] = wait_seconds / steps
        metrics["samples"] = metrics["step"] * self.config.batch
        self._last_step, self._last_time, self.last = metrics["step"], now, metrics
        self._file.write(json.dumps(_null_non_finite(metrics), allow_nan=False) + "\n")
        self._file.flush()
        if self._board:
            for name in ("loss", "grad_norm", "lr", "seconds_per_step"):
                self._board.add_scalar(name, metrics[name], metrics["step"])


def _null_non_finite(value: Any) -> Any:
    """Return a JSON value with None in place of NaN and infinity."""
    if isinstance(value, dict):
        return {name: _null_non_finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_null_non_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    os.replace(partial, path)


def _open_tensorboard(folder: Path) -> "SummaryWriter":
    try:
        from torch.utils.tensorboard import SummaryWriter  # optional
    except ImportError as error:
        raise UsageError(
            "tensorboard=true needs the package tensorboard; run pip install tensorboard"
        ) from error
    return SummaryWriter(folder / "tensorboard")
