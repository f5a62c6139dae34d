"""A description of the machine, and its peak rates: copy bandwidth and matrix products."""

import argparse
import datetime
import importlib.metadata
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.cases import Shape, is_cuda
from bench.common import options as opt
from bench.common import records
from bench.common.records import ROOT, Record, Run
from bench.common.timing import Timer
from mvsplit_ops._check import DTYPES

CPU_COPY_MB, GPU_COPY_MB = 256, 1024


@dataclass(frozen=True)
class MachineRecord(Record):
    """The machine's peak rates."""

    kind = "machine"
    copy_bytes_per_second: float
    matmul_flops_per_second: float
    matmul_dtype: str


def describe_run(shape: Shape | None = None) -> Run:
    """Return date, commit, software and shape: the fields that every record has."""
    run: Run = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _output_of(["git", "describe", "--always", "--dirty", "--abbrev=12"], ROOT),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
    }
    if shape is not None:
        dtype = str(shape.dtype).removeprefix("torch.")
        run["shape"] = {**asdict(shape), "segments": list(shape.segments), "dtype": dtype}
    return run


def describe_machine(device: str | torch.device, backend: str | None = None) -> Run:
    """Return the processor that was measured, and its state.

    instruction_set  of the cpu backend, where that is `backend`
    capability, driver, clocks  of a GPU: [9, 0]; its driver; MHz according to nvidia-smi
    """
    cuda = is_cuda(device)
    described: Run = {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": None,
    }
    if backend == "cpu" and not cuda:
        extension = importlib.import_module("mvsplit_ops._C")  # may not be built
        described["instruction_set"] = extension.capability()
    if cuda:
        described["capability"] = list(torch.cuda.get_device_capability(device))
        described |= _query_nvidia_smi(device)
    return described


def measure_copy(device: str, megabytes: int = CPU_COPY_MB, repeats: int = 15) -> float:
    """Return bytes per second, read and written, of a large tensor copy."""
    source = torch.ones(megabytes << 20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timer = Timer(device)
    seconds = [timer(lambda: target.copy_(source))[0] for _ in range(repeats + 3)][3:]
    return 2 * source.numel() / statistics.median(seconds)


def measure_matmul(
    device: str | torch.device, dtype: torch.dtype, size: int | None = None, repeats: int = 7
) -> float:
    """Return FLOP per second of a product of two square matrices of random numbers.

    Random, since a GPU multiplies zeros at higher clocks. size: 8192 on a GPU, 1024 on a CPU.
    """
    size = size or (8192 if is_cuda(device) else 1024)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    timer = Timer(device)
    seconds = [timer(lambda: a @ b)[0] for _ in range(repeats + 3)][3:]
    return 2 * size**3 / statistics.median(seconds)


def measure(
    device: str, dtype: torch.dtype, progress: opt.ReportProgress = opt.no_progress
) -> MachineRecord:
    """Return a record of the machine's peak rates."""
    progress("copy", 2)
    copy = measure_copy(device, GPU_COPY_MB if is_cuda(device) else CPU_COPY_MB)
    progress("matrix product", 2)
    rate = measure_matmul(device, dtype)
    run: Run = describe_run() | describe_machine(device)
    return MachineRecord(run, copy, rate, str(dtype).removeprefix("torch."))


def _query_nvidia_smi(device: str | torch.device) -> Run:
    """Return driver and clocks of a GPU; each is None where nvidia-smi cannot be run."""
    uuid = torch.cuda.get_device_properties(device).uuid
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm"
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={fields}"]
    output = _output_of([*command, "--format=csv,noheader,nounits"])
    if output is None:
        return {"driver": None, "clocks": None}
    driver, *clocks = (part.strip() for part in output.splitlines()[0].split(","))
    return {"driver": driver, "clocks": dict(zip(("sm", "memory", "sm_max"), clocks, strict=True))}


def _output_of(command: list[str], folder: Path | None = None) -> str | None:
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _triton_version() -> str | None:
    """Return the version without an import, which would decide whether Triton interprets."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def add_options(parser: argparse.ArgumentParser) -> None:
    opt.add_device(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="dtype of the matrix product"
    )
    opt.add_json(parser)


def run_command(args: argparse.Namespace) -> None:
    device = opt.select_device(args)
    with opt.show_progress("machine") as progress:
        record = measure(device, DTYPES[args.dtype], progress)
    records.append(record.to_json(), args.json)
    copy, rate = record.copy_bytes_per_second / 1e9, record.matmul_flops_per_second / 1e12
    opt.make_console().print(
        f"{record.run['device']}: copies {copy:,.1f} GB/s, read and written; multiplies matrices "
        f"at {rate:,.3g} TFLOP/s in {record.matmul_dtype}"
    )
