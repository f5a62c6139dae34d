"""Time of whole optimizer steps of model/, and its breakdown.

Implementations (eager, torch.compile, the backends), residuals and checkpointing policies take
turns in one process, on one model. Then one step of each is profiled and its time split up.
"""

import argparse
import contextlib
import functools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from bench.cases import is_cuda
from bench.common import options as opt
from bench.common import records
from bench.common.machine import describe_run, measure_matmul
from bench.common.text_tables import NOTHING, Row, Table, format_ratio, format_scaled
from bench.common.timing import Seconds, Timer, make_profiler, no_collection, time_interleaved
from bench.measure import op_ranges, workload
from bench.measure.op_ranges import CPU_STEPS, NO_TRACING, Range, Tracing
from bench.measure.workload import COMPILE, COMPILED, EAGER, Workload, compiles
from model.config import CONTENDERS, RESIDUALS, preset
from model.train.memory import POLICIES, plan
from mvsplit_ops import _backends

STEP_PARTS = (
    *("matrix products", "attention", "operators", "other pointwise", "optimizer"),
    *("communication", "launch gaps"),
)
UPDATE = Range("optimizer", "fwd", None)

Variant = tuple[str, str, str]  # residual, implementation, checkpointing


@dataclass(frozen=True)
class StepTiming:
    """One residual in one implementation under one policy; seconds are medians of a step.

    breakdown   {part of a step: seconds}; launch gaps: the time of a step beyond the other parts
    flops       of the model's matrix products and attention, recomputation not counted
    peak_bytes  of tensors: on a GPU PyTorch's allocations; None if it cannot be counted
    """

    residual: str
    implementation: str
    checkpointing: str
    loader: float  # drawing the batch, which a run does while a step runs
    gradients: float  # forward and backward
    update: float  # the gradient norm, clipping and AdamW
    breakdown: dict[str, float]
    tokens_per_second: float
    flops: int
    peak_bytes: int | None

    @property
    def variant(self) -> Variant:
        return self.residual, self.implementation, self.checkpointing

    @property
    def step(self) -> float:
        return self.gradients + self.update


@dataclass(frozen=True)
class Steps(records.Record):
    """A run, its rows, and {variant: the reason why it was not timed}."""

    kind = "step"
    rows: list[StepTiming]
    failed: dict[str, str] = field(default_factory=dict)  # older records lack it


def measure(
    name: str,
    overrides: dict[str, Any],
    variants: Sequence[Variant],
    repeats: int,
    tracing: Tracing = NO_TRACING,
    progress: opt.ReportProgress = opt.no_progress,
) -> Steps:
    """Time steps of preset `name` in every variant.

    The batch is drawn before and is not in the time. tracing: its file is of the last variant's
    profiled step.
    """
    residuals = dict.fromkeys(residual for residual, *_ in variants)
    steps = 2 + len(residuals) + 2 * len(variants)
    run, config = describe_run(), preset(name, **overrides)
    workloads = {}
    for residual in residuals:
        progress(f"{residual}: building", steps)
        changes = {**CONTENDERS.get(residual, {}), **overrides, "residual": residual}
        workloads[residual] = Workload(preset(name, **changes))
    fitting, failed = [], {}
    for variant in variants:
        progress(f"first step: {', '.join(variant)}", steps)
        if reason := _try_step(workloads[variant[0]], *variant[1:]):
            failed[", ".join(variant)] = reason
        else:
            fitting.append(variant)
    if not fitting:
        raise RuntimeError(f"no step fits in memory: {'; '.join(failed.values())}; try --batch 1")
    progress("timing", steps)
    device = workloads[fitting[0][0]].device
    calls = {variant: workloads[variant[0]].make_calls(*variant[1:]) for variant in fitting}
    seconds = time_interleaved(calls, repeats, Timer(device))
    rows = []
    for variant in fitting:
        progress(f"splitting up: {', '.join(variant)}", steps)
        own = tracing if variant == fitting[-1] else tracing.only_nvtx()
        rows.append(_make_row(workloads[variant[0]], variant, seconds[variant], own))
    progress("matrix product", steps)
    names = [implementation for _, implementation, _ in fitting]
    run |= workload.describe_training(name, config, device, names, repeats)
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    run["matmul_flops_per_second"] = measure_matmul(device, dtype)
    return Steps(run, rows, failed)


def _try_step(load: Workload, implementation: str, checkpointing: str) -> str | None:
    """Run a first step; return the error if it runs out of memory, else None."""
    try:
        with load.running(implementation, checkpointing):
            load.step()
            load.synchronize()
    except torch.OutOfMemoryError as error:
        load.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return str(error).splitlines()[0]
    return None


def _make_row(load: Workload, variant: Variant, seconds: Seconds, tracing: Tracing) -> StepTiming:
    _, implementation, checkpointing = variant
    gradients, update, _ = seconds
    timer, config = Timer("cpu"), load.config
    loader = statistics.median(timer(functools.partial(load.draw, i))[0] for i in range(3))
    with load.running(implementation, checkpointing):
        counted = is_cuda(load.device) or not compiles(implementation)
        peak = load.measure_peak() if counted else None
        parts = _split_step(load, implementation, tracing)
    parts[STEP_PARTS[-1]] = max(0.0, gradients + update - sum(parts.values()))
    tokens_per_s = config.batch * sum(config.segments) / (gradients + update)
    flops = plan(replace(config, checkpointing="none", device="cpu")).flops
    return StepTiming(*variant, loader, gradients, update, parts, tokens_per_s, flops, peak)


def _split_step(load: Workload, implementation: str, tracing: Tracing) -> dict[str, float]:
    """Return {part: seconds} of a profiled step without gaps: on a CPU of the fastest of several.

    On a GPU the time is that of kernels, on a CPU the self time of operations.
    """
    cuda = is_cuda(load.device)
    span = tracing.with_nvtx(op_ranges.record_function)
    ranges: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if not compiles(implementation):  # eager operators in compiled code count as pointwise
        ranges = op_ranges.label_model(load.model, span)
    splits = []
    with ranges, no_collection():
        for _ in range(1 if cuda else CPU_STEPS):
            load.synchronize()
            with make_profiler(load.device) as profile:
                load.gradients()
                with span(UPDATE):
                    load.update()
                load.synchronize()
            splits.append(sum_parts(profile.events(), cuda))
    tracing.export(profile)
    return min(splits, key=lambda parts: sum(parts.values()))


def sum_parts(events: Iterable[FunctionEvent], cuda: bool) -> dict[str, float]:
    """Return {part: seconds} of a profiler's events, gaps left out."""
    seconds = dict.fromkeys(STEP_PARTS[:-1], 0.0)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        if cuda:
            own = event.self_device_time_total
        else:  # everything but operations is Python, autograd's engine or a range: a gap
            is_operation = "::" in event.name or _INDUCTOR in event.name
            own = event.self_cpu_time_total if is_operation else 0.0
        if own and not event.name.startswith("autograd::"):
            seconds[_part_of(event)] += own / 1e6
    return seconds


_INDUCTOR = "CompiledFxGraph"  # the loops that torch.compile wrote, on a CPU

# The first part with a matching name; the rest is pointwise, a reduction or a copy.
_NAMES = (
    ("operators", ("mvsplit::",)),
    ("attention", ("scaled_dot_product", "flash_attention", "efficient_attention")),
    ("matrix products", ("::mm", "::addmm", "::bmm", "::baddbmm", "::linear", "convolution")),
    ("communication", ("nccl", "c10d::", "gloo")),
)


def _part_of(event: FunctionEvent) -> str:
    for part, names in _NAMES:
        if any(name in event.name for name in names):
            return part
    range_ = op_ranges.innermost_range(event)
    if range_ == UPDATE:
        return "optimizer"
    return "operators" if range_ and range_.name in _backends.OPS else "other pointwise"


STEP_COLUMNS = (
    *("residual", "implementation", "checkpointing", "loader ms", "gradients ms", "update ms"),
    *("step ms", "tokens/s", "TFLOP/s", "% of matmul", "peak GB", "vs first"),
)


def format_rows(steps: Steps) -> list[Row]:
    """Return the STEP_COLUMNS of each variant."""
    peak_rate = steps.run.get("matmul_flops_per_second")
    return [
        (
            *row.variant,
            *(format_scaled(s, 1e-3) for s in (row.loader, row.gradients, row.update, row.step)),
            format_scaled(row.tokens_per_second, 1, 0),
            format_scaled(row.flops / row.step, 1e12, 3),
            f"{100 * (row.flops / row.step) / peak_rate:.0f}%" if peak_rate else NOTHING,
            format_scaled(row.peak_bytes, 1e9, 2),
            format_ratio(steps.rows[0].step, row.step),
        )
        for row in steps.rows
    ]


def format_breakdown(steps: Steps) -> tuple[Row, list[Row]]:
    """Return columns and rows: the milliseconds of each part of a step, a row per variant."""
    parts = list(dict.fromkeys(part for row in steps.rows for part in row.breakdown))
    rows: list[Row] = [
        (*row.variant, *(format_scaled(row.breakdown.get(part), 1e-3) for part in parts))
        for row in steps.rows
    ]
    return (*STEP_COLUMNS[:3], *(f"{part} ms" for part in parts)), rows


def format_notes(steps: Steps) -> tuple[str, ...]:
    run, c = steps.run, steps.run["config"]
    data = "random latents" if c["data"] == "latents" and not c["data_path"] else c["data"]
    return (
        workload.training_headline(run, f"batch {c['batch']} of {data}"),
        f"Medians of {run['repeats']} steps taken in turn, without the loader's time. TFLOP/s of "
        "the model's matrix products and attention, recomputation not counted; % of matmul: "
        "compared with a matrix product measured in the same run.",
        f"The parts are the self time of {'kernels' if 'capability' in run else 'operations'} in a "
        "profiled step; launch gaps: the time of a step without the profiler beyond the other "
        "parts. Compiled eager operators count as other pointwise work.",
        *(f"{variant}: {reason}" for variant, reason in steps.failed.items()),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    workload.add_preset(parser, "preset")
    opt.add_count(parser, "--blocks", "blocks (default: the preset's)")
    opt.add_count(parser, "--batch", "samples of a step (default: the preset's)")
    opt.add_device(parser)
    parser.add_argument(
        *("--implementation", "--backend"),
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"implementations, of {', '.join(workload.TRAINABLE)} (default: eager, compile "
        "and the backends that run here)",
    )
    parser.add_argument(
        "--residual",
        nargs="+",
        default=["mvsplit"],
        metavar="RESIDUAL",
        help=f"residuals, of {', '.join(RESIDUALS)}; {', '.join(CONTENDERS)} have initial values "
        "of their own",
    )
    parser.add_argument(
        "--checkpointing",
        nargs="+",
        metavar="POLICY",
        help=f"policies for the last implementation: {', '.join(POLICIES)} or k/n (default: those "
        "four; the other implementations have the preset's)",
    )
    opt.add_count(parser, "--repeats", "timed steps per variant", 5)
    op_ranges.add_tracing(parser)
    opt.add_json(parser)


def run_command(args: argparse.Namespace) -> None:
    tracing = Tracing.from_args(args)
    device = opt.select_device(args)
    name, overrides = workload.configuration(args, device)
    fused = workload.default_backends(device)
    default = [EAGER, COMPILE, *(name + COMPILED for name in fused), *fused]
    names = workload.check_trainable(args.implementation or default, device)
    policies = args.checkpointing or POLICIES
    for policy in policies:  # an unknown policy is refused before anything is built
        preset(name, **{**overrides, "checkpointing": policy})
    own_policy = preset(name, **overrides).checkpointing
    variants = _make_variants(args.residual, names, own_policy, policies)
    with opt.show_progress("step") as progress:
        result = measure(name, overrides, variants, args.repeats, tracing, progress)
    records.append(result.to_json(), args.json)
    console = opt.make_console()
    rows, notes = format_rows(result), format_notes(result)
    console.print(Table("One optimizer step", STEP_COLUMNS, rows).to_terminal())
    console.print(Table("Breakdown", *format_breakdown(result), notes).to_terminal())


def _make_variants(
    residuals: Sequence[str], names: Sequence[str], own_policy: str, policies: Sequence[str]
) -> list[Variant]:
    """Return every implementation under the preset's policy, then the last under the others."""
    variants = []
    for residual in residuals:
        variants += [(residual, implementation, own_policy) for implementation in names]
        variants += [(residual, names[-1], policy) for policy in policies]
    return list(dict.fromkeys(variants))
