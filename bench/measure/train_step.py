"""Whole optimizer steps of model/: how long they take, and what the time goes to.

Implementations (eager, torch.compile, the backends), residuals and checkpointing policies take
turns in one process, on one model. Then one step of each is profiled, and its time split up.
"""

import contextlib
import statistics
from dataclasses import asdict, dataclass, replace

import torch
from torch.autograd import DeviceType

from bench.common import options as opt
from bench.common import records, text_tables
from bench.common.machine import describe_machine, describe_run, matmul_rate
from bench.common.timing import Timer, interleaved, no_collection, profiler
from bench.measure import op_ranges, workload
from bench.measure.op_ranges import Range, labelled, nvtx, record_function, spans
from bench.measure.workload import COMPILE, COMPILED, EAGER, Workload, compiles
from model.config import CONTENDERS, RESIDUALS, preset
from model.train.memory import POLICIES, LiveBytes, plan
from mvsplit_ops import _backends

STEP_PARTS = (
    *("matrix products", "attention", "operators", "other pointwise", "optimizer"),
    *("communication", "launch gaps"),
)
UPDATE = Range("optimizer", "fwd", None)
TAKES = 3  # profiled steps on a CPU


@dataclass(frozen=True)
class StepTiming:
    """One residual in one implementation under one policy; seconds are medians of a step.

    breakdown   {part of a step: seconds}; launch gaps: what the step has beyond the other parts
    flops       of the model's matrix products and attention, without those computed again
    peak_bytes  of tensors: on a GPU what PyTorch took; None where it cannot be told
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
    def step(self):
        return self.gradients + self.update


@dataclass(frozen=True)
class Steps:
    """A run, its rows, and {variant: why it was not timed}."""

    run: dict
    rows: list[StepTiming]
    failed: dict[str, str]

    def to_json(self):
        return {"kind": "step", **asdict(self)}

    @classmethod
    def from_json(cls, record):
        return cls(
            record["run"], [StepTiming(**row) for row in record["rows"]], record.get("failed", {})
        )


def measure(name, overrides, variants, repeats, traced=None, marked=False, progress=None):
    """Time steps of preset `name`: variants are (residual, implementation, checkpointing).

    The batch is drawn before and is not in the time. traced: a file for a Chrome trace of the last
    variant's profiled step; marked: NVTX ranges in the profiled steps.
    """
    progress = progress or (lambda what, of: None)
    steps = 2 + len({residual for residual, *_ in variants}) + 2 * len(variants)
    run, config = describe_run(), preset(name, **overrides)
    workloads = {}
    for residual in dict.fromkeys(residual for residual, *_ in variants):
        progress(f"{residual}: building", steps)
        workloads[residual] = Workload(workload.with_residual(name, overrides, residual))
    fit, failed = [], {}
    for variant in variants:
        progress(f"first step: {', '.join(variant)}", steps)
        why = _out_of_memory(workloads[variant[0]], *variant[1:])
        if why:
            failed[", ".join(variant)] = why
        else:
            fit.append(variant)
    if not fit:
        raise RuntimeError(f"no step fits in memory: {'; '.join(failed.values())}; try --batch 1")
    progress("timing", steps)
    device = next(iter(workloads.values())).device
    calls = {variant: _calls(workloads[variant[0]], *variant[1:]) for variant in fit}
    seconds = interleaved(calls, repeats, Timer(device))
    rows = []
    for variant in fit:
        progress(f"splitting up: {', '.join(variant)}", steps)
        trace = traced if variant == fit[-1] else None
        rows.append(_row(workloads[variant[0]], variant, seconds[variant], trace, marked))
    progress("matrix product", steps)
    cpu = any(implementation == "cpu" for _, implementation, _ in fit)
    run |= {
        **describe_machine(device, "cpu" if cpu else None),
        "preset": name,
        "config": asdict(config),
        "repeats": repeats,
        "matmul_flops_per_second": matmul_rate(device, _matmul_dtype(config)),
    }
    return Steps(run, rows, failed)


def _out_of_memory(load, implementation, checkpointing):
    """Why a first step finds no memory, in a line; None when it does."""
    try:
        with load.running(implementation, checkpointing):
            load.step()
            load.synchronize()
    except torch.OutOfMemoryError as error:
        load.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return str(error).splitlines()[0]
    return None


def _calls(load, implementation, checkpointing):
    def forward():
        with load.running(implementation, checkpointing):
            load.gradients()

    return forward, lambda _: load.update()


def _row(load, variant, seconds, traced, marked):
    residual, implementation, checkpointing = variant
    timer = Timer("cpu")
    loader = statistics.median(timer(lambda i=i: load.draw(i))[0] for i in range(3))
    with load.running(implementation, checkpointing):
        peak = _peak_bytes(load, implementation)
        parts = _split_up(load, implementation, traced, marked)
    return StepTiming(
        *variant,
        loader,
        *seconds,
        breakdown={**parts, STEP_PARTS[-1]: max(0.0, sum(seconds) - sum(parts.values()))},
        tokens_per_second=workload.tokens(load.config) / sum(seconds),
        flops=plan(replace(load.config, checkpointing="none", device="cpu")).flops,
        peak_bytes=peak,
    )


def _peak_bytes(load, implementation):
    """Bytes of tensors at the worst moment of a step, states of the model and optimizer included.

    On a CPU counted at PyTorch's dispatcher, which a compiled graph passes by.
    """
    if torch.device(load.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(load.device)
        load.step()
        return torch.cuda.max_memory_allocated(load.device)
    if compiles(implementation):
        return None
    with LiveBytes() as live:
        load.step()
    moments = [t for s in load.optimizer.state.values() for t in s.values()]
    states = [*load.model.parameters(), *load.model.buffers(), *moments]
    return live.peak + sum(t.nbytes for t in states)


def _split_up(load, implementation, traced, marked):
    """{part: seconds} of a profiled step, gaps left out: of the least disturbed on a CPU.

    On a GPU parts are kernels, on a CPU the self time of operations.
    """
    cuda = torch.device(load.device).type == "cuda"
    span = spans(record_function, *([nvtx] if marked else []))
    found = []
    # There are no ranges in compiled code: eager operators in it are pointwise like the rest.
    ranges_on = contextlib.nullcontext() if compiles(implementation) else labelled(load.model, span)
    with ranges_on, no_collection():
        for _ in range(1 if cuda else TAKES):
            load.synchronize()
            with profiler(load.device) as profile:
                load.gradients()
                with span(UPDATE):
                    load.update()
                load.synchronize()
            found.append(parts_of(profile.events(), cuda))
    if traced:
        profile.export_chrome_trace(str(traced))
    return min(found, key=lambda parts: sum(parts.values()))


def parts_of(events, cuda):
    """{part: seconds} of a profiler's events, gaps left out."""
    seconds = dict.fromkeys(STEP_PARTS[:-1], 0.0)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        if cuda:
            own = event.self_device_time_total
        else:  # what is no operation is Python, autograd's engine or a range: a gap
            works = "::" in event.name or _INDUCTOR in event.name
            own = event.self_cpu_time_total if works else 0.0
        if own and not event.name.startswith("autograd::"):
            seconds[_part(event)] += own / 1e6
    return seconds


_INDUCTOR = "CompiledFxGraph"  # the loops that torch.compile wrote, on a CPU

# The first that fits an operation's name; what fits none is pointwise, a reduction or a copy.
_NAMES = (
    ("operators", ("mvsplit::",)),
    ("attention", ("scaled_dot_product", "flash_attention", "efficient_attention")),
    ("matrix products", ("::mm", "::addmm", "::bmm", "::baddbmm", "::linear", "convolution")),
    ("communication", ("nccl", "c10d::", "gloo")),
)


def _part(event):
    for part, names in _NAMES:
        if any(name in event.name for name in names):
            return part
    around = event
    while around is not None:
        of = Range.parse(around.name)
        if of == UPDATE:
            return "optimizer"
        if of is not None and of.name in _backends.OPS:
            return "operators"
        if of is not None:
            return "other pointwise"
        around = around.cpu_parent
    return "other pointwise"


def _matmul_dtype(config):
    return torch.float32 if config.precision == "fp32" else torch.bfloat16


def table(steps):
    """A row a variant: its seconds, beside the first of its residual, and what they go to."""
    columns = (
        *("residual", "implementation", "checkpointing", "loader ms", "gradients", "update"),
        *("step ms", "to the first", "tokens/s", "TFLOP/s", "% matmul", "peak GB"),
    )
    peak_rate = steps.run["matmul_flops_per_second"]
    cells = []
    for row in steps.rows:
        rate = row.flops / row.step
        cells.append(
            (
                *(row.residual, row.implementation, row.checkpointing),
                *(f"{1e3 * s:.1f}" for s in (row.loader, row.gradients, row.update, row.step)),
                f"{row.step / steps.rows[0].step:.3f}x",
                f"{row.tokens_per_second:,.0f}",
                f"{rate / 1e12:.3g}",
                f"{100 * rate / peak_rate:.1f}",
                "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.3g}",
            )
        )
    return text_tables.terminal("One optimizer step", columns, cells, notes(steps))


def breakdown_table(steps):
    """A row a variant: percent of its step."""
    columns = "residual", "implementation", "checkpointing", *STEP_PARTS
    cells = [
        (
            *(row.residual, row.implementation, row.checkpointing),
            *(f"{100 * s / sum(row.breakdown.values()):.1f}%" for s in row.breakdown.values()),
        )
        for row in steps.rows
    ]
    gpu = steps.run.get("capability")
    caption = (
        "Self time of "
        + ("kernels" if gpu else "operations, which the profiler makes longer,")
        + " in a profiled step; gaps: what the step above has beyond them. Eager operators that "
        "are compiled are among the other pointwise work.",
    )
    return text_tables.terminal("What a step goes to", columns, cells, caption)


def notes(steps):
    run, c = steps.run, steps.run["config"]
    data = "random latents" if c["data"] == "latents" and not c["data_path"] else c["data"]
    return (
        f"{run['device']}, {run['threads']} threads, torch {run['torch']}; {run['preset']}: "
        f"{c['depth']} blocks of width {c['dim']}, batch {c['batch']} of {data}, "
        f"{c['precision']}; {run['date']}, {run['commit']}",
        f"Medians of {run['repeats']} steps taken in turn, the loader's wait not in them. FLOPs of "
        "the model's matrix products and attention, those computed again not counted; matmul: "
        f"{run['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s, measured in this run.",
        *(f"{variant}: {why}" for variant, why in steps.failed.items()),
    )


def options(p):
    workload.add_preset(p, "preset")
    p.add_argument("--blocks", type=opt.positive, help="blocks (default: the preset's)")
    p.add_argument("--batch", type=opt.positive, help="samples of a step (default: the preset's)")
    opt.add_device(p)
    p.add_argument(
        "--backend",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"implementations, of {', '.join(workload.TRAINABLE)} (default: eager, compile "
        "and the backends that run here)",
    )
    p.add_argument(
        "--residual",
        nargs="+",
        default=["mvsplit"],
        metavar="RESIDUAL",
        help=f"of {', '.join(RESIDUALS)}; {', '.join(CONTENDERS)} start as suits them",
    )
    p.add_argument(
        "--checkpointing",
        nargs="+",
        metavar="POLICY",
        help=f"policies for the last implementation: {', '.join(POLICIES)} or k/n (default: those "
        "four; the others have the preset's)",
    )
    p.add_argument("--repeats", type=opt.positive, default=5, help="timed steps of each")
    op_ranges.add_options(p)
    opt.add_json(p)


def command(args):
    opt.writable(args.json)
    op_ranges.check_options(args)
    device = opt.device(args)
    name, overrides = workload.configuration(args, device)
    fused = workload.fused_by_default(device)
    default = [EAGER, COMPILE, *(name + COMPILED for name in fused), *fused]
    names = workload.implementations(args.backend or default, device)
    variants = _variants(name, overrides, args.residual, names, args.checkpointing or POLICIES)
    with opt.progress("step") as progress:
        result = measure(name, overrides, variants, args.repeats, args.trace, args.nvtx, progress)
    if args.json:
        records.append(result.to_json(), args.json)
    console = opt.console()
    console.print(table(result))
    console.print(breakdown_table(result))


def _variants(name, overrides, residuals, names, policies):
    """Every implementation under the preset's policy, then the last one under the others."""
    own = preset(name, **overrides).checkpointing
    for policy in policies:  # a policy that is none is refused before anything is built
        preset(name, **{**overrides, "checkpointing": policy})
    found = []
    for residual in residuals:
        found += [(residual, implementation, own) for implementation in names]
        found += [(residual, names[-1], policy) for policy in policies]
    return list(dict.fromkeys(found))
