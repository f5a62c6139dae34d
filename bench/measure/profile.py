"""The paper's operator profile, measured on the machine in front of you.

Per operator: calls per optimizer step, time per call forward and backward, milliseconds per step in
eager PyTorch, torch.compile and the fused operator, and how near the fused one comes to the copy
bandwidth.
"""

import functools
from dataclasses import asdict, dataclass

import torch

from bench.cases import PAPER_MS, PROFILE, calls_per_step
from bench.common import options as opt
from bench.common import records, text_tables
from bench.common.accuracy import Judge, forward_backward
from bench.common.machine import copy_bandwidth, describe_machine, describe_run
from bench.common.timing import Timer, interleaved
from bench.measure import in_loop, op_ranges, workload
from model.train.heap import keep_freed_memory
from mvsplit_ops import _backends

PROFILED = ("eager", "compile", "fused")


@dataclass(frozen=True)
class OperatorTiming:
    """One operator. Seconds are medians of one call; bytes are what the mathematics must move."""

    op: str
    title: str
    part_of: str | None
    forward_calls: int
    backward_calls: int
    seconds: dict[str, tuple[float, float]]  # implementation: (forward, backward)
    bytes: tuple[float, float]

    def ms_per_step(self, name):
        forward, backward = self.seconds[name]
        return 1e3 * (self.forward_calls * forward + self.backward_calls * backward)

    def bytes_per_second(self, name):
        """Over a step's mix of forward and backward calls."""
        moved = self.forward_calls * self.bytes[0] + self.backward_calls * self.bytes[1]
        return moved / (self.ms_per_step(name) / 1e3)

    def call_ms(self, name):
        """One forward and one backward."""
        return 1e3 * sum(self.seconds[name])


@dataclass(frozen=True)
class Profile:
    """A run of the profile: where, of what, and its rows."""

    run: dict
    copy_bytes_per_second: float
    rows: list[OperatorTiming]

    def total(self, of):
        """Sum of of(row) over the operators, RoPE and QK-Norm counted as the one they make."""
        return sum(of(row) for row in self.rows if row.part_of is None)

    def to_json(self):
        return asdict(self)

    @classmethod
    def from_json(cls, record):
        rows = [
            OperatorTiming(**{**r, "bytes": tuple(r["bytes"]), "seconds": _tuples(r["seconds"])})
            for r in record["rows"]
        ]
        return cls(record["run"], record["copy_bytes_per_second"], rows)


def _tuples(seconds):
    return {name: tuple(pair) for name, pair in seconds.items()}


def measure(shape, blocks=400, repeats=30, backend=None, progress=lambda what, of: None):
    """Measure the profile's operators at a shape.

    progress(what is being done, steps in all) is called before each step.
    Inaccurate: an implementation's result is wrong; nothing of that operator is timed.
    RuntimeError: the backend cannot run here.
    """
    keep_freed_memory()
    run, backend = describe_run(shape), _usable_backend(backend, shape.device)
    steps = 2 + 2 * len(PROFILE)
    progress("copy bandwidth", steps)
    bandwidth = [copy_bandwidth(shape.device)]
    rows = []
    for case in PROFILE:
        progress(f"{case.title}: compiling, checking", steps)
        rows.append(_measure_case(case, shape, blocks, repeats, backend, steps, progress))
    progress("copy bandwidth", steps)
    bandwidth.append(copy_bandwidth(shape.device))
    run |= {**describe_machine(shape.device, backend), "backend": backend}
    return Profile({**run, "blocks": blocks, "repeats": repeats}, max(bandwidth), rows)


def _usable_backend(backend, device):
    """The backend to profile; RuntimeError at once where it lacks an operator."""
    backend = _backends.resolve("profile", backend, torch.empty(0, device=device))
    if backend != "reference":
        for case in PROFILE:
            _backends.kernel(backend, case.op, "_fwd", torch.device(device).type)
    if backend == "triton" and torch.device(device).type == "cpu":
        raise RuntimeError(
            "profile: on a CPU Triton interprets its kernels, and there is nothing to time; "
            "pass --device cuda, or count their bytes with python -m bench traffic"
        )
    return backend


def _measure_case(case, shape, blocks, repeats, backend, steps, progress):
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
    progress(f"{case.title}: timing", steps)
    calls = {name: forward_backward(f, *inputs) for name, f in functions.items()}
    forward_calls, backward_calls = calls_per_step(case, blocks)
    return OperatorTiming(
        op=case.op,
        title=case.title,
        part_of=case.part_of,
        forward_calls=forward_calls,
        backward_calls=backward_calls,
        seconds=interleaved(calls, repeats, Timer(shape.device)),
        bytes=(case.fwd(shape) * shape.pass_bytes, case.bwd(shape) * shape.pass_bytes),
    )


COLUMNS = (
    "operator",
    "calls fwd/bwd",
    "fwd ms eager/compile/fused",
    "bwd ms eager/compile/fused",
    "ms/step eager",
    "compile",
    "fused",
    "speed-up vs eager",
    "vs compile",
    "GB/s",
    "% of copy",
)


def cells(profile):
    """The table of a profile: a tuple of strings for each operator, then the totals."""
    rows = []
    for row in profile.rows:
        forward, backward = (
            " / ".join(f"{1e3 * row.seconds[n][i]:.3f}" for n in ("eager", "compile", "fused"))
            for i in (0, 1)
        )
        calls = f"{row.forward_calls} / {row.backward_calls}"
        title = f"({row.title})" if row.part_of else row.title
        speed = row.bytes_per_second("fused")
        rows.append((title, calls, forward, backward, *_summary(profile, row.ms_per_step, speed)))

    def total_ms(name):
        return profile.total(lambda row: row.ms_per_step(name))

    moved = profile.total(lambda r: r.bytes_per_second("fused") * r.ms_per_step("fused"))
    summary = _summary(profile, total_ms, moved / total_ms("fused"))
    return [*rows, ("total, this machine", "", "", "", *summary)]


def _summary(profile, ms, bytes_per_second):
    eager, compiled, fused = (ms(name) for name in ("eager", "compile", "fused"))
    return (
        f"{eager:.0f}",
        f"{compiled:.0f}",
        f"{fused:.0f}",
        f"{eager / fused:.2f}x",
        f"{compiled / fused:.2f}x",
        f"{bytes_per_second / 1e9:.1f}",
        f"{100 * bytes_per_second / profile.copy_bytes_per_second:.0f}%",
    )


def headline(profile):
    """Where and of what, in one line."""
    run = profile.run
    threads = f", {run['threads']} threads" if run["instruction_set"] else ""
    return (
        f"{run['device']}{threads}, backend {run['backend']}"
        f"{' (' + run['instruction_set'] + ')' if run['instruction_set'] else ''}, "
        f"torch {run['torch']}; {text_tables.shape_text(run['shape'])}; "
        f"{run['blocks']} blocks, three of four checkpointed; "
        f"copy {profile.copy_bytes_per_second / 1e9:.1f} GB/s; {run['date']}, {run['commit']}"
    )


def notes(profile):
    """What a reader must know to read the table."""
    one_call = [profile.total(lambda r, n=n: r.call_ms(n)) for n in ("eager", "compile", "fused")]
    eager, compiled, fused = one_call
    paper = PAPER_MS["eager"], PAPER_MS["fused"]
    return (
        "Rows in brackets are replaced by RoPE + QK-Norm and not in the total. GB/s counts the "
        "bytes that the mathematics must move; the copy is of 256 MiB, while a call's tensors may "
        "stay in cache.",
        f"One forward and one backward call of each operator, summed: {eager:.2f} ms eager, "
        f"{compiled:.2f} ms torch.compile, {fused:.2f} ms fused: {eager / fused:.2f}x and "
        f"{compiled / fused:.2f}x.",
        f"The paper's own figures, on 8 H100 at its batch, not this machine: {paper[0]} ms eager, "
        f"{paper[1]} ms with its kernels, {paper[0] / paper[1]:.2f}x.",
    )


def print_table(profile, console):
    """The profile on a terminal."""
    *rows, total = cells(profile)
    console.print(headline(profile))
    title = "Operators per optimizer step"
    console.print(text_tables.terminal(title, COLUMNS, rows, notes(profile), total))


def options(p):
    opt.add_shape(p)
    opt.add_device(p)
    p.add_argument(
        "--blocks", type=opt.positive, help="blocks, 3/4 of them recomputed (default: 400)"
    )
    p.add_argument("--backend", choices=_backends.BACKENDS, help="fused column (default: device's)")
    p.add_argument(
        "--repeats", type=opt.positive, help="timed calls of each (default: 30), steps (5)"
    )
    opt.add_json(p)
    loop = p.add_argument_group(
        "in the loop",
        "With --in-loop the operators are measured within whole training steps, eager and fused in "
        "turn. The model says which tokens and dtype; --blocks and --batch change the preset's.",
    )
    loop.add_argument("--in-loop", action="store_true", help="measure within training steps")
    workload.add_preset(loop)
    op_ranges.add_options(loop)
    p.set_defaults(**dict.fromkeys(OF_CALLS))  # so that what was asked for can be told


OF_CALLS, OF_STEPS = ("batch", "tokens", "dtype"), ("preset", "set", "trace", "nvtx")


def command(args):
    opt.writable(args.json)
    op_ranges.check_options(args)
    _fit_together(args)
    device = opt.device(args)
    with opt.progress("profile") as progress:
        result, table = (_in_loop if args.in_loop else _one_by_one)(args, device, progress)
    if args.json:
        records.append(result.to_json(), args.json)
    table(opt.console())


def _fit_together(args):
    """ValueError where an option is of the other way to measure."""
    for name in ("tokens", "dtype") if args.in_loop else OF_STEPS:
        if getattr(args, name):
            remedy = "the model's: change it with --set" if args.in_loop else "add --in-loop"
            raise ValueError(f"--{name} {'is ' if args.in_loop else 'is of steps: '}{remedy}")


def _one_by_one(args, device, progress):
    shape = opt.shape(args, device)
    result = measure(shape, args.blocks or 400, args.repeats or 30, args.backend, progress)
    return result, functools.partial(print_table, result)


def _in_loop(args, device, progress):
    name, overrides = workload.configuration(args, device)
    overrides = {"checkpointing": "3/4", **overrides}
    fused = [args.backend] if args.backend else workload.fused_by_default(device)
    names = workload.implementations([workload.EAGER, *fused], device)
    result = in_loop.measure(
        name, overrides, names, args.repeats or 5, args.trace, args.nvtx, progress
    )
    return result, lambda console: console.print(in_loop.table(result))
