"""The paper's operator profile, measured on this machine.

Per operator: calls per optimizer step, time per call forward and backward, milliseconds per step in
eager PyTorch, torch.compile and the fused operator, and the fused operator's share of the copy
bandwidth.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console

from bench.cases import PAPER_NOTE, PROFILE, Case, Shape, calls_per_step
from bench.common import options as opt
from bench.common import records, text_tables
from bench.common.accuracy import Judge, forward_backward
from bench.common.machine import describe_machine, describe_run, measure_copy
from bench.common.options import ReportProgress, no_progress
from bench.common.records import Run
from bench.common.timing import Timer, time_interleaved
from bench.measure import in_loop, op_ranges, workload
from model.train.heap import keep_freed_memory
from mvsplit_ops import _backends

PROFILED = ("eager", "compile", "fused")


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
class Profile:
    """A run of the profile and its rows."""

    run: Run
    copy_bytes_per_second: float
    rows: list[OperatorTiming]

    def total(self, value: Callable[[OperatorTiming], float]) -> float:
        """Return the sum over the operators, with RoPE + QK-Norm instead of its two parts."""
        return sum(value(row) for row in self.rows if row.part_of is None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Profile":
        rows = []
        for row in record["rows"]:
            seconds = {name: tuple(pair) for name, pair in row["seconds"].items()}
            rows.append(OperatorTiming(**{**row, "bytes": tuple(row["bytes"]), "seconds": seconds}))
        return cls(record["run"], record["copy_bytes_per_second"], rows)


def measure(
    shape: Shape,
    blocks: int = 400,
    repeats: int = 30,
    backend: str | None = None,
    progress: ReportProgress = no_progress,
) -> Profile:
    """Measure the profile's operators at a shape.

    Inaccurate: an implementation's result is wrong; nothing of that operator is timed.
    RuntimeError: the backend cannot run here.
    """
    keep_freed_memory()
    run, backend = describe_run(shape), _usable_backend(backend, shape.device)
    steps = 2 + 2 * len(PROFILE)
    progress("copy bandwidth", steps)
    bandwidth = [measure_copy(shape.device)]
    rows = []
    for case in PROFILE:
        progress(f"{case.title}: compiling, checking", steps)
        calls = _checked_calls(case, shape, backend)
        progress(f"{case.title}: timing", steps)
        seconds = time_interleaved(calls, repeats, Timer(shape.device))
        counts = calls_per_step(case, blocks)
        rows.append(
            OperatorTiming(
                case.op, case.title, case.part_of, *counts, seconds, case.bytes_to_move(shape)
            )
        )
    progress("copy bandwidth", steps)
    bandwidth.append(measure_copy(shape.device))
    run |= describe_machine(shape.device, backend)
    run |= {"backend": backend, "blocks": blocks, "repeats": repeats}
    return Profile(run, max(bandwidth), rows)


def _usable_backend(backend: str | None, device: str) -> str:
    """Return the backend to profile; RuntimeError if it lacks an operator."""
    backend = _backends.resolve("profile", backend, torch.empty(0, device=device))
    device_type = torch.device(device).type
    if backend != "reference":
        for case in PROFILE:
            _backends.load_kernel(backend, case.op, "_fwd", device_type)
    if backend == "triton" and device_type == "cpu":
        raise RuntimeError(
            "profile: on a CPU Triton interprets its kernels, so there is nothing to time; "
            "pass --device cuda, or count their bytes with python -m bench traffic"
        )
    return backend


def _checked_calls(case: Case, shape: Shape, backend: str) -> dict[str, Any]:
    """Return {implementation: (forward, backward)} after checking every result."""
    inputs = case.example(shape)
    torch.compiler.reset()
    functions = {
        "eager": case.reference,
        "compile": torch.compile(case.reference, fullgraph=True),
        "fused": case.fused(backend),
    }
    judge = Judge(case, inputs)
    for name, function in functions.items():
        judge.require(name, function)
    return {name: forward_backward(f, *inputs) for name, f in functions.items()}


PROFILE_COLUMNS = (
    *("operator", "calls fwd/bwd", "fwd ms eager/compile/fused", "bwd ms eager/compile/fused"),
    *("ms/step eager", "compile", "fused", "speed-up vs eager", "vs compile", "GB/s", "% of copy"),
)


def format_cells(profile: Profile) -> list[tuple[str, ...]]:
    """Return the table of a profile: a row of strings per operator, then the totals."""
    rows = []
    for row in profile.rows:
        forward, backward = (
            " / ".join(f"{1e3 * row.seconds[n][i]:.3f}" for n in PROFILED) for i in (0, 1)
        )
        calls = f"{row.forward_calls} / {row.backward_calls}"
        title = f"({row.title})" if row.part_of else row.title
        summary = _summary(profile, row.ms_per_step, row.bytes_per_step())
        rows.append((title, calls, forward, backward, *summary))

    def total_ms(name: str) -> float:
        return profile.total(lambda row: row.ms_per_step(name))

    summary = _summary(profile, total_ms, profile.total(OperatorTiming.bytes_per_step))
    return [*rows, ("total, this machine", "", "", "", *summary)]


def _summary(profile: Profile, ms: Callable[[str], float], moved: float) -> tuple[str, ...]:
    eager, compiled, fused = map(ms, PROFILED)
    bytes_per_second = moved / (fused / 1e3)
    share = bytes_per_second / profile.copy_bytes_per_second
    return (
        *(f"{eager:.0f}", f"{compiled:.0f}", f"{fused:.0f}"),
        *(f"{eager / fused:.2f}x", f"{compiled / fused:.2f}x"),
        *(f"{bytes_per_second / 1e9:.1f}", f"{100 * share:.0f}%"),
    )


def format_headline(profile: Profile) -> str:
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

    def one_call_ms(name: str) -> float:
        return profile.total(lambda row: row.call_ms(name))

    eager, compiled, fused = map(one_call_ms, PROFILED)
    return (
        "Rows in brackets are replaced by RoPE + QK-Norm and not in the total. GB/s counts the "
        "bytes that the mathematics must move; the copy is of 256 MiB, while a call's tensors may "
        "stay in cache.",
        f"One forward and one backward call of each operator, summed: {eager:.2f} ms eager, "
        f"{compiled:.2f} ms torch.compile, {fused:.2f} ms fused: {eager / fused:.2f}x and "
        f"{compiled / fused:.2f}x.",
        PAPER_NOTE,
    )


def print_table(profile: Profile, console: Console) -> None:
    *rows, total = format_cells(profile)
    console.print(format_headline(profile))
    title = "Operators per optimizer step"
    console.print(
        text_tables.build_table(title, PROFILE_COLUMNS, rows, format_notes(profile), total)
    )


CALL_OPTIONS, STEP_OPTIONS = ("batch", "tokens", "dtype"), ("preset", "set", "trace", "nvtx")


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
    parser.set_defaults(**dict.fromkeys(CALL_OPTIONS))  # None: not given


def run_command(args: argparse.Namespace) -> None:
    tracing = op_ranges.Tracing.from_args(args)
    _check_options(args)
    device = opt.select_device(args)
    console = opt.make_console()
    result: Profile | in_loop.InLoop
    with opt.show_progress("profile") as progress:
        if args.in_loop:
            result = _measure_in_loop(args, device, tracing, progress)
        else:
            shape, repeats = opt.chosen_shape(args, device), args.repeats or 30
            result = measure(shape, args.blocks or 400, repeats, args.backend, progress)
    if args.json:
        records.append(result.to_json(), args.json)
    if isinstance(result, Profile):
        print_table(result, console)
    else:
        console.print(in_loop.build_table(result))


def _check_options(args: argparse.Namespace) -> None:
    """Raise ValueError if an option belongs to the other of the two measurements."""
    for name in ("tokens", "dtype") if args.in_loop else STEP_OPTIONS:
        if getattr(args, name):
            if args.in_loop:
                raise ValueError(f"--{name} is defined by the model: change it with --set")
            raise ValueError(f"--{name} applies to training steps only: add --in-loop")


def _measure_in_loop(
    args: argparse.Namespace,
    device: str,
    tracing: op_ranges.Tracing,
    progress: ReportProgress,
) -> in_loop.InLoop:
    name, overrides = workload.configuration(args, device)
    overrides = {"checkpointing": "3/4", **overrides}
    fused = [args.backend] if args.backend else workload.default_backends(device)
    names = workload.check_trainable([workload.EAGER, *fused], device)
    return in_loop.measure(name, overrides, names, args.repeats or 5, tracing, progress)
