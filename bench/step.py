"""Whole optimizer steps of model/: residuals and backends, taking turns in one process."""

from dataclasses import asdict, dataclass

import mvsplit_ops as mv
from bench import tables
from bench.profile import describe_machine, describe_run
from bench.timing import Timer, interleaved
from model.config import CONTENDERS, preset
from model.data import open_dataset
from model.dit import build
from model.optim import make_optimizer
from model.step import draw_batch, gradient_norm, gradients, prepare, update


@dataclass(frozen=True)
class Row:
    """Medians of one residual on one backend, in seconds."""

    residual: str
    backend: str
    gradients: float  # forward and backward
    update: float  # the gradient norm, clipping and AdamW

    @property
    def step(self):
        return self.gradients + self.update


@dataclass(frozen=True)
class Steps:
    run: dict
    rows: list

    def to_json(self):
        return {"kind": "step", **asdict(self)}

    @classmethod
    def from_json(cls, record):
        return cls(record["run"], [Row(**row) for row in record["rows"]])


def measure(name, overrides, residuals, backends, repeats, progress=lambda what, of: None):
    """Time steps of preset `name`; the batch is drawn before and not in the time.

    RuntimeError: a backend cannot run here.
    """
    config = preset(name, **overrides)
    device = prepare(config)
    batch = draw_batch(config, open_dataset(config), 0)
    calls = {}
    for residual in residuals:
        of = preset(name, **{**CONTENDERS[residual], **overrides, "residual": residual})
        for backend in backends:
            progress(f"{residual}, {backend}: building", len(residuals) * len(backends) + 1)
            calls[residual, backend] = _step(of, batch, device, backend)
    progress("timing", len(calls) + 1)
    seconds = interleaved(calls, repeats, Timer(device))
    run = {
        **describe_run(),
        **describe_machine(device, "cpu" if "cpu" in backends else backends[0]),
        "preset": name,
        "config": asdict(config),
        "repeats": repeats,
    }
    return Steps(run, [Row(*key, *pair) for key, pair in seconds.items()])


def _step(config, batch, device, backend):
    model = build(config, device)
    optimizer = make_optimizer(model, config)

    def forward():
        with mv.use_backend(backend):
            gradients(config, model, batch, device)

    def backward(_):
        update(config, 0, optimizer, gradient_norm(optimizer))

    return forward, backward


def table(steps):
    """Rows of steps, each beside those of the first backend and of the first residual."""
    by = {(row.residual, row.backend): row.step for row in steps.rows}
    columns = (
        *("residual", "backend", "gradients ms", "update ms", "step ms"),
        *("to the first backend", "to the first residual"),
    )
    first = steps.rows[0]
    cells = [
        (
            *(row.residual, row.backend),
            *(f"{1e3 * t:.1f}" for t in (row.gradients, row.update, row.step)),
            f"{row.step / by[row.residual, first.backend]:.3f}x",
            f"{row.step / by[first.residual, row.backend]:.3f}x",
        )
        for row in steps.rows
    ]
    run, config = steps.run, steps.run["config"]
    caption = (
        f"{run['device']}, {run['threads']} threads; {run['preset']}: {config['depth']} blocks of "
        f"width {config['dim']}, batch {config['batch']}, {config['precision']}, checkpointing "
        f"{config['checkpointing']}",
        f"medians of {run['repeats']} steps taken in turn; torch {run['torch']}",
    )
    return tables.terminal("One optimizer step", columns, cells, caption)
