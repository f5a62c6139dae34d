"""What a machine can do at best: the rate at which it copies, and multiplies matrices."""

import datetime
import importlib.metadata
import platform
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch

from bench.common import options as opt
from bench.common import records
from bench.common.timing import Timer
from mvsplit_ops._check import DTYPES


def describe_run(shape=None):
    """What every record says of its run."""
    run = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
    }
    if shape is not None:
        dtype = str(shape.dtype).removeprefix("torch.")
        run["shape"] = {**asdict(shape), "segments": list(shape.segments), "dtype": dtype}
    return run


def describe_machine(device, backend=None):
    """The processor that was measured, and the state it was in.

    instruction_set  of the cpu backend, where that is `backend`
    capability, driver, clocks  of a GPU: (9, 0); its driver; MHz as nvidia-smi gives them
    """
    cuda = torch.device(device).type == "cuda"
    found = {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": None if cuda else _instruction_set(backend),
    }
    if cuda:
        found["capability"] = list(torch.cuda.get_device_capability(device))
        found |= _nvidia_smi(device)
    return found


def copy_bandwidth(device, megabytes=256, repeats=15):
    """Bytes per second, read and written, of a large tensor copy."""
    source = torch.ones(megabytes << 20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timer = Timer(device)
    seconds = [timer(lambda: target.copy_(source))[0] for _ in range(repeats + 3)][3:]
    return 2 * source.numel() / statistics.median(seconds)


def matmul_rate(device, dtype, size=None, repeats=7):
    """FLOP per second of a product of two square matrices of random numbers.

    Random, since a GPU multiplies zeros at higher clocks. size: 8192 on a GPU, 1024 on a CPU.
    """
    size = size or (8192 if torch.device(device).type == "cuda" else 1024)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    timer = Timer(device)
    seconds = [timer(lambda: a @ b)[0] for _ in range(repeats + 3)][3:]
    return 2 * size**3 / statistics.median(seconds)


def measure(device, dtype, progress=lambda what, of: None):
    """A record of what the machine can do at best."""
    progress("copy", 2)
    copy = copy_bandwidth(device, megabytes=1024 if torch.device(device).type == "cuda" else 256)
    progress("matrix product", 2)
    rate = matmul_rate(device, dtype)
    return {
        "kind": "machine",
        "run": {**describe_run(), **describe_machine(device)},
        "copy_bytes_per_second": copy,
        "matmul_flops_per_second": rate,
        "matmul_dtype": str(dtype).removeprefix("torch."),
    }


def _instruction_set(backend):
    if backend != "cpu":
        return None
    from mvsplit_ops import _C

    return _C.capability()


def _nvidia_smi(device):
    """{"driver", "clocks"} of a GPU; each None where nvidia-smi is not there to ask."""
    uuid = torch.cuda.get_device_properties(device).uuid
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm"
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={fields}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {"driver": None, "clocks": None}
    driver, *clocks = (part.strip() for part in done.stdout.splitlines()[0].split(","))
    return {"driver": driver, "clocks": dict(zip(("sm", "memory", "sm_max"), clocks, strict=True))}


def _cpu_name():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _triton():
    try:  # its version, without importing it: an import decides whether it interprets its kernels
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit():
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def options(p):
    opt.add_device(p)
    p.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the matrix product")
    opt.add_json(p)


def command(args):
    opt.writable(args.json)
    device = opt.device(args)
    with opt.progress("machine") as progress:
        found = measure(device, DTYPES[args.dtype], progress)
    if args.json:
        records.append(found, args.json)
    copy, rate = found["copy_bytes_per_second"], found["matmul_flops_per_second"]
    opt.console().print(
        f"{found['run']['device']}: copies {copy / 1e9:,.1f} GB/s, read and written; multiplies "
        f"matrices at {rate / 1e12:,.3g} TFLOP/s in {found['matmul_dtype']}"
    )
