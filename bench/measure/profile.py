"""The paper's operator profile, measured on this machine.

Per operator: calls per optimizer step, time per call forward and backward, milliseconds per step in
eager PyTorch, torch.compile and the fused operator, and the fused operator's share of the copy
bandwidth.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.cases import PAPER_NOTE, PROFILE, Case, Shape, calls_per_step
from bench.common import options as opt
from bench.common import records, text_tables
from bench.common.accuracy import Judge, forward_backward
from bench.common.machine import describe_machine, describe_run, measure_copy
from bench.common.text_tables import Table
from bench.common.timing import CallPair, Timer, time_interleaved
from bench.measure import implementations, in_loop, op_ranges, workload
from bench.measure.workload import EAGER
from model.train.heap import keep_freed_memory
from mvsplit_ops import _backends

PROFILED = ("eager", "compile", "fused")
STEP_OPTIONS = ("preset", "set", "trace", "nvtx")


@dataclass(frozen=True)
class OperatorTiming:
    """One operator. Seconds are medians of one call; bytes are those that must move."""

    op: str
    title: str
    part_of: str | None
    forward_calls: int
    backward_calls: int
    seconds: dict[str, tuple[float, float]]  # implementation: (forward, backward)
    bytes: tuple[float, float]

    def ms_per_step(self, name: str) -> float:
        forward, backward = self.seconds[name]
        return 1e3 * (self.forward_calls * forward + self.backward_calls * backward)

    def bytes_per_step(self) -> float:
        return self.forward_calls * self.bytes[0] + self.backward_calls * self.bytes[1]

    def bytes_per_second(self, name: str) -> float:
        """Return the rate over a step's mix of forward and backward calls."""
        return self.bytes_per_step() / (self.ms_per_step(name) / 1e3)

    def call_ms(self, name: str) -> float:
        """Return the time of one forward and one backward."""
        return 1e3 * sum(self.seconds[name])


@dataclass(frozen=True)
class Profile(records.Record):
    """A run of the profile and its rows."""

    kind = "profile"
    copy_bytes_per_second: float
    rows: list[OperatorTiming]

    @property
    def total_rows(self) -> list[OperatorTiming]:
        """The operators of the total: RoPE + QK-Norm instead of its two parts."""
        return [row for row in self.rows if row.part_of is None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)  # without the kind: see records.read


def measure(
    shape: Shape,
    blocks: int = 400,
    repeats: int = 30,
    backend: str | None = None,
    progress: opt.ReportProgress = opt.no_progress,
) -> Profile:
    """Measure the profile's operators at a shape.

    Inaccurate: an implementation's result is wrong; nothing of that operator is timed.
    RuntimeError: the backend cannot run here.
    """
    keep_freed_memory()
    run = describe_run(shape)
    backend = _backends.resolve("profile", backend, torch.empty(0, device=shape.device))
    workload.require_timeable(backend, shape.device, [case.op for case in PROFILE])
    steps = 2 + 2 * len(PROFILE)
    progress("copy bandwidth", steps)
    bandwidth = [measure_copy(shape.device)]
    rows = []
    for case in PROFILE:
        progress(f"{case.title}: compiling, checking", steps)
        calls = _checked_calls(case, shape, backend)
        progress(f"{case.title}: timing", steps)
        medians = time_interleaved(calls, repeats, Timer(shape.device))
        seconds = {name: (forward, backward) for name, (forward, backward, _) in medians.items()}
        counts, moved = calls_per_step(case, blocks), case.bytes_to_move(shape)
        rows.append(OperatorTiming(case.op, case.title, case.part_of, *counts, seconds, moved))
    progress("copy bandwidth", steps)
    bandwidth.append(measure_copy(shape.device))
    run |= describe_machine(shape.device, backend)
    run |= {"backend": backend, "blocks": blocks, "repeats": repeats}
    return Profile(run, max(bandwidth), rows)


def _checked_calls(case: Case, shape: Shape, backend: str) -> dict[str, CallPair]:
    """Return {implementation: (forward, backward)} after checking every result."""
    inputs = case.example(shape)
    torch.compiler.reset()
    functions = {
        "eager": implementations.load_function("eager", case, shape.device),
        "compile": implementations.load_function("compile", case, shape.device),
        "fused": case.fused(backend),
    }
    judge = Judge(case, inputs)
    for name, function in functions.items():
        judge.require(name, function, peer=name != "fused")
    return {name: forward_backward(f, *inputs) for name, f in functions.items()}


def format_cells(profile: Profile) -> list[tuple[str, ...]]:
    """Return the table of a profile: a row of strings per operator, then the totals."""
    rows = []
    for row in profile.rows:
        calls = f"{row.forward_calls} / {row.backward_calls}"
        seconds = zip(*(row.seconds[name] for name in PROFILED), strict=True)
        call_ms = (" / ".join(f"{1e3 * s:.3f}" for s in direction) for direction in seconds)
        title = f"({row.title})" if row.part_of else row.title
        rows.append((title, calls, *call_ms, *_summary(profile, [row])))
    return [*rows, ("total, this machine", "", "", "", *_summary(profile, profile.total_rows))]


def _summary(profile: Profile, rows: Sequence[OperatorTiming]) -> tuple[str, ...]:
    eager, compiled, fused = (sum(row.ms_per_step(name) for row in rows) for name in PROFILED)
    bytes_per_second = sum(row.bytes_per_step() for row in rows) / (fused / 1e3)
    share = bytes_per_second / profile.copy_bytes_per_second
    return (
        *(f"{eager:.0f}", f"{compiled:.0f}", f"{fused:.0f}"),
        *(f"{eager / fused:.2f}x", f"{compiled / fused:.2f}x"),
        *(f"{bytes_per_second / 1e9:.1f}", f"{100 * share:.0f}%"),
    )


def _format_headline(profile: Profile) -> str:
    """Return machine, backend and shape of a profile in one line."""
    run, backend = profile.run, profile.run["backend"]
    threads = ""
    if run["instruction_set"]:
        threads, backend = f", {run['threads']} threads", f"{backend} ({run['instruction_set']})"
    return (
        f"{run['device']}{threads}, backend {backend}, torch {run['torch']}; "
        f"{text_tables.shape_text(run['shape'])}; "
        f"{run['blocks']} blocks, three of four checkpointed; "
        f"copy {profile.copy_bytes_per_second / 1e9:.1f} GB/s; {run['date']}, {run['commit']}"
    )


def format_notes(profile: Profile) -> tuple[str, ...]:
    """Return the notes below the table."""
    eager, compiled, fused = (
        sum(row.call_ms(name) for row in profile.total_rows) for name in PROFILED
    )
    return (
        f"{_format_headline(profile)}.",
        "Rows in brackets are replaced by RoPE + QK-Norm and not in the total. GB/s counts the "
        "bytes that must move; the copy is of 256 MiB, while a call's tensors may stay in cache.",
        f"One forward and one backward call of each operator, summed: {eager:.2f} ms eager, "
        f"{compiled:.2f} ms torch.compile, {fused:.2f} ms fused: {eager / fused:.2f}x and "
        f"{compiled / fused:.2f}x.",
        PAPER_NOTE,
    )


def make_table(profile: Profile) -> Table:
    calls = "calls fwd/bwd", "fwd ms eager/compile/fused", "bwd ms eager/compile/fused"
    steps = "ms/step eager", "compile", "fused", "speed-up vs eager", "vs compile"
    columns = "operator", *calls, *steps, "GB/s", "% of copy"
    *rows, total = format_cells(profile)
    title, notes = "Operators per optimizer step", format_notes(profile)
    return Table(title, columns, rows, notes, total)


def add_options(parser: argparse.ArgumentParser) -> None:
    opt.add_shape(parser)
    opt.add_device(parser)
    opt.add_count(parser, "--blocks", "blocks, 3/4 of them recomputed (default: 400)")
    parser.add_argument(
        "--backend",
        choices=_backends.BACKENDS,
        help="backend of the fused column (default: the device's)",
    )
    opt.add_count(parser, "--repeats", "timed calls per implementation (default: 30), or steps (5)")
    opt.add_json(parser)
    loop = parser.add_argument_group(
        "in the loop",
        "With --in-loop the operators are measured within whole training steps, eager and fused in "
        "turn. The model defines tokens and dtype; --blocks and --batch change the preset's.",
    )
    loop.add_argument("--in-loop", action="store_true", help="measure within training steps")
    workload.add_preset(loop)
    op_ranges.add_tracing(loop)
    parser.set_defaults(batch=None, tokens=None, dtype=None)  # None: not given


def run_command(args: argparse.Namespace) -> None:
    tracing = op_ranges.Tracing.from_args(args)
    _check_options(args)
    device = opt.select_device(args)
    result: Profile | in_loop.InLoop
    with opt.show_progress("profile") as progress:
        if args.in_loop:
            name, overrides = workload.configuration(args, device)
            overrides = {"checkpointing": "3/4", **overrides}
            fused = [args.backend] if args.backend else workload.default_backends(device)
            names, repeats = workload.check_trainable([EAGER, *fused], device), args.repeats or 5
            result = in_loop.measure(name, overrides, names, repeats, tracing, progress)
        else:
            shape, repeats = opt.chosen_shape(args, device), args.repeats or 30
            result = measure(shape, args.blocks or 400, repeats, args.backend, progress)
    records.append(result.to_json(), args.json)
    table = make_table(result) if isinstance(result, Profile) else in_loop.make_table(result)
    opt.make_console().print(table.to_terminal())


def _check_options(args: argparse.Namespace) -> None:
    """Raise ValueError if an option belongs to the other of the two measurements."""
    names = ("tokens", "dtype") if args.in_loop else STEP_OPTIONS
    reason = "applies to training steps only: add --in-loop"
    if args.in_loop:
        reason = "is defined by the model: change it with --set"
    for name in names:
        if getattr(args, name):
            raise ValueError(f"--{name} {reason}")
