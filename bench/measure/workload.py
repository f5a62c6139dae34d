"""The training workload of the benchmarks: a preset's model, its optimizer and one batch."""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

import mvsplit_ops as mv
from bench.cases import PlainArithmetic
from bench.common.machine import describe_machine
from bench.common.records import Run
from bench.common.timing import CallPair
from model.config import PRESETS, Config, parse_overrides, preset
from model.train.fixed_batch import FixedBatchTraining
from model.train.heap import keep_freed_memory
from mvsplit_ops import _backends

EAGER = "eager"  # the backend `reference` in plain arithmetic, nothing compiled
COMPILE = "compile"  # the same, with every block given to torch.compile
COMPILED = "+compile"  # a backend's operators within blocks given to torch.compile
_FUSED = [b for b in _backends.BACKENDS if b != "reference"]
TRAINABLE = (EAGER, COMPILE, *_FUSED, *(b + COMPILED for b in _FUSED))


def add_preset(parser: argparse._ActionsContainer, name: str = "--preset") -> None:
    """Add the options that choose the model."""
    parser.add_argument(
        name,
        choices=PRESETS,
        metavar="PRESET",
        nargs=None if name.startswith("-") else "?",
        help=f"one of {', '.join(PRESETS)} (default: {_default_preset('cpu')}, "
        f"on a GPU {_default_preset('cuda')})",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of the preset, as python -m model train --help lists them; without data_path "
        "latents are random numbers",
    )


def configuration(args: argparse.Namespace, device: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the preset and the overridden fields."""
    name = args.preset or _default_preset(device)
    overrides = {"device": device, "probes": False, "data_path": "", **parse_overrides(args.set)}
    if args.threads:
        overrides["threads"] = args.threads
    if args.blocks:
        overrides["depth"] = args.blocks
    config = preset(name, **overrides)
    batch = args.batch or config.micro_batch or config.batch  # one micro-batch: the paper's step
    return name, {**overrides, "batch": batch, "micro_batch": 0}


def _default_preset(device: str) -> str:
    return "collapse100" if device == "cpu" else "dit400-mvsplit"


class Workload(FixedBatchTraining):
    """Training steps on a fixed batch, in any of the implementations."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        keep_freed_memory()  # a benchmark measures time, for every implementation alike

    @contextlib.contextmanager
    def running(self, implementation: str, checkpointing: str | None = None) -> Iterator[None]:
        """Run the model as one of TRAINABLE within the block.

        One model serves all of them, so that the largest fits: the weights are the same.
        """
        model, blocks, config = self.model, self.model.blocks, self.model.config
        if compiles(implementation):
            model.blocks = self.compiled_blocks
        model.config = dataclasses.replace(
            config, checkpointing=checkpointing or config.checkpointing
        )
        try:
            with use_implementation(implementation):
                yield
        finally:
            model.blocks, model.config = blocks, config

    def make_calls(self, implementation: str, checkpointing: str | None = None) -> CallPair:
        """Return (forward and backward, update) for timing."""

        def forward() -> None:
            with self.running(implementation, checkpointing):
                self.gradients()

        return forward, lambda _: self.update()

    @functools.cached_property
    def compiled_blocks(self) -> torch.nn.ModuleList:
        blocks = (cast("torch.nn.Module", torch.compile(b)) for b in self.model.blocks)
        return torch.nn.ModuleList(blocks)


def compiles(implementation: str) -> bool:
    """Return whether an implementation gives blocks to torch.compile."""
    return implementation.endswith(COMPILE)


@contextlib.contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Run operators as one of TRAINABLE does within the block; eager code in plain arithmetic."""
    plain = PlainArithmetic() if name in (EAGER, COMPILE) else contextlib.nullcontext()
    with mv.use_backend(_backend_of(name)), plain:
        yield


def _backend_of(implementation: str) -> str:
    if implementation in (EAGER, COMPILE):
        return "reference"
    return implementation.removesuffix(COMPILED)


def check_trainable(names: Sequence[str], device: str) -> list[str]:
    """Return the names without duplicates; ValueError or RuntimeError if one cannot train here."""
    names = [EAGER if name == "reference" else name for name in names]
    for name in names:
        if name not in TRAINABLE:
            known = ", ".join(TRAINABLE)
            raise ValueError(f"implementation must be one of {known}, got {name!r}")
        require_timeable(_backend_of(name), device)
    return list(dict.fromkeys(names))


def require_timeable(backend: str, device: str, ops: Sequence[str] = ("swiglu",)) -> None:
    """Raise RuntimeError unless a backend runs operators on a device without emulation."""
    if backend == "reference":
        return
    kind = torch.device(device).type
    for op in ops:
        _backends.load_kernel(backend, op, "_fwd", kind)
    if kind == "cpu" and backend != "cpu":
        raise RuntimeError(
            f"{backend} only emulates its kernels on a CPU, so there is nothing to time; pass "
            "--device cuda, or count their bytes with python -m bench traffic"
        )


def default_backends(device: str) -> list[str]:
    """Return the backends that are compared if none is named: those that run on the device."""
    kind = torch.device(device).type
    candidates = ("cpu",) if kind == "cpu" else ("triton", "cuda")
    return [b for b in candidates if _backends.find_missing(b, "swiglu", kind) is None]


def describe_training(
    name: str, config: Config, device: str, implementations: Sequence[str], repeats: int
) -> Run:
    """Return the machine and the settings of measured training steps."""
    return {
        **describe_machine(device, "cpu" if "cpu" in implementations else None),
        "preset": name,
        "config": dataclasses.asdict(config),
        "repeats": repeats,
    }


def training_headline(run: Run, *details: str) -> str:
    """Return machine, preset and details of measured training steps, in one line."""
    c = run["config"]
    settings = ", ".join((f"{c['depth']} blocks of width {c['dim']}", *details, c["precision"]))
    return (
        f"{run['device']}, {run['threads']} threads, torch {run['torch']}; {run['preset']}: "
        f"{settings}; {run['date']}, {run['commit']}"
    )
