"""The paper's operator profile, measured on the machine in front of you.

Per operator: calls per optimizer step, time per call forward and backward, milliseconds per step in
eager PyTorch, torch.compile and the fused operator, and how near the fused one comes to the copy
bandwidth.
"""

import datetime
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.accuracy import cotangent, require_case
from bench.cases import PROFILE, calls_per_step
from bench.timing import Timer, copy_bandwidth, interleaved
from model.heap import keep_freed_memory
from mvsplit_ops import _backends

IMPLEMENTATIONS = ("eager", "compile", "fused")

# arXiv 2605.06169: operators per optimizer step, eager and its fused kernels, 400 blocks on 8 H100.
PAPER_MS = {"eager": 1697.4, "fused": 614.0}


@dataclass(frozen=True)
class Row:
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
    rows: list[Row]

    def total(self, of):
        """Sum of of(row) over the operators, RoPE and QK-Norm counted as the one they make."""
        return sum(of(row) for row in self.rows if row.part_of is None)

    def to_json(self):
        return asdict(self)

    @classmethod
    def from_json(cls, record):
        rows = [
            Row(**{**r, "bytes": tuple(r["bytes"]), "seconds": _tuples(r["seconds"])})
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
    backend = _usable_backend(backend, shape.device)
    steps = 2 + 2 * len(PROFILE)
    progress("copy bandwidth", steps)
    bandwidth = [copy_bandwidth(shape.device)]
    rows = []
    for case in PROFILE:
        progress(f"{case.title}: compiling, checking", steps)
        rows.append(_measure_case(case, shape, blocks, repeats, backend, steps, progress))
    progress("copy bandwidth", steps)
    bandwidth.append(copy_bandwidth(shape.device))
    return Profile(_describe_run(shape, blocks, repeats, backend), max(bandwidth), rows)


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
    inputs = case.inputs(shape, torch.Generator().manual_seed(0))
    torch.compiler.reset()
    functions = {
        "eager": case.reference,
        "compile": torch.compile(case.reference, fullgraph=True),
        "fused": case.fused(backend),
    }
    for name, function in functions.items():
        require_case(case, name, function, inputs)
    progress(f"{case.title}: timing", steps)
    calls = {name: _forward_backward(f, *inputs) for name, f in functions.items()}
    forward_calls, backward_calls = calls_per_step(case, blocks)
    return Row(
        op=case.op,
        title=case.title,
        part_of=case.part_of,
        forward_calls=forward_calls,
        backward_calls=backward_calls,
        seconds=interleaved(calls, repeats, Timer(shape.device)),
        bytes=(case.fwd(shape) * shape.pass_bytes, case.bwd(shape) * shape.pass_bytes),
    )


def _forward_backward(function, activations, constants, kwargs):
    leaves = [t.detach().requires_grad_() for t in activations]
    generator = torch.Generator().manual_seed(1)
    cotangents = [cotangent(t, generator) for t in function(leaves, constants, kwargs)]

    def forward():
        return function(leaves, constants, kwargs)

    def backward(outputs):
        return torch.autograd.grad(outputs, leaves, cotangents)

    return forward, backward


def _describe_run(shape, blocks, repeats, backend):
    return {
        **describe_run(shape),
        **describe_machine(shape.device, backend),
        "backend": backend,
        "blocks": blocks,
        "repeats": repeats,
    }


def describe_run(shape=None):
    """What every record says of its run."""
    run = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if shape is not None:
        run["shape"] = {**asdict(shape), "dtype": str(shape.dtype).removeprefix("torch.")}
    return run


def describe_machine(device, backend):
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": None if cuda else _instruction_set(backend),
    }


def _instruction_set(backend):
    if backend != "cpu":
        return None
    from mvsplit_ops import _C

    return _C.capability()


def _cpu_name():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit():
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
