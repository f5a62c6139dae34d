"""Command line: a report of what each backend can run here, and `build`, which compiles kernels."""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

import mvsplit_ops as mv
from mvsplit_ops import _backends
from mvsplit_ops._check import DTYPES
from mvsplit_ops._cuda import catalogue, compile, gpu
from mvsplit_ops._cuda.launch import LIMITS, Program

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")  # A100, H100 and H200, B200


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    if arguments.command == "build":
        sys.exit(build(arguments))
    report()


def report() -> None:
    """Print which backend runs each operator here, and why the others cannot."""
    state = mv.backends()
    print(f"mvsplit_ops {mv.__version__}, torch {torch.__version__}, {_describe_devices()}")
    print(f"default for cpu tensors: {_backends.DEFAULTS['cpu']}")
    for line in _describe_cuda_defaults():
        print(f"default for cuda tensors{line}")
    width = max(map(len, _backends.OPS))
    print(f"\n{'':{width}}  " + "  ".join(f"{b:>9}" for b in state))
    for op in _backends.OPS:
        marks = ("yes" if ops[op] is None else "-" for ops in state.values())
        print(f"{op:{width}}  " + "  ".join(f"{m:>9}" for m in marks))
    reasons = {(b, reason): None for b, ops in state.items() for reason in ops.values() if reason}
    if reasons:
        print()
    for backend, reason in reasons:
        print(f"{backend}: {reason}")


def _describe_cuda_defaults() -> list[str]:
    """Return a line for each measured compute capability: its backends and their records."""
    if not _backends.MEASURED:
        backend = _backends.UNMEASURED[0]
        return [f": {backend} for every operator, until a benchmark shows which is fastest"]
    rows: dict[tuple[int, int], dict[tuple[str, str | None], list[str]]] = {}
    for (capability, op), choice in _backends.FASTEST.items():
        rows.setdefault(capability, {}).setdefault(choice, []).append(op)
    lines = []
    for (major, minor), row in rows.items():
        choices = (f"{b} ({f or 'not measured'}): {', '.join(ops)}" for (b, f), ops in row.items())
        lines.append(f" of compute capability {major}.{minor}: {'; '.join(choices)}")
    return lines


def build(arguments: argparse.Namespace) -> str | int:
    """Compile the kernels that are missing, as many as possible; return the status to exit with."""
    prebuilt = arguments.compiler == "nvcc" and arguments.cache is None
    folder = compile.PREBUILT if prebuilt else arguments.cache or compile.cache_folder()
    compiler: compile.Compiler
    try:
        compiler = compile.nvcc() if arguments.compiler == "nvcc" else compile.nvrtc()
    except RuntimeError as error:
        return str(error)
    architectures, refusals = _select_supported(arguments.arch or _find_architectures(), compiler)
    dtypes = [DTYPES[name] for name in dict.fromkeys(arguments.dtype)]
    jobs = [(p, arch) for arch in architectures for p in _list_programs(arch, dtypes)]
    print(f"{compiler.name}: {len(jobs)} programs, in {folder}", flush=True)

    def attempt(job: tuple[Program, str]) -> tuple[bool, str | None]:
        """Return whether a program was compiled now, and the error if it failed."""
        try:
            return compile.build(*job, compiler, folder)[1], None
        except RuntimeError as error:
            return False, str(error)

    compiled, failed, errors = 0, 0, dict.fromkeys(refusals)  # jobs may share an error
    with ThreadPoolExecutor() as pool:
        outcomes = zip(jobs, pool.map(attempt, jobs), strict=True)
        for number, ((program, arch), (new, failure)) in enumerate(outcomes, 1):
            word = "failed" if failure else "compiled" if new else "present"
            defines = " ".join(program.defines)
            print(f"{number:4} {word:8} {arch:7} {program.source} {defines}", flush=True)
            compiled += new
            if failure:
                failed += 1
                errors[failure] = None
    for path in compile.find_outdated(folder, _list_programs) if prebuilt else ():
        path.unlink(missing_ok=True)
    counts = f"{compiled} compiled, {len(jobs) - compiled - failed} already present"
    print(f"{counts}{f', {failed} failed' if failed else ''}: {folder}", flush=True)
    return "\n".join(errors) or 0


def _list_programs(architecture: str, dtypes: Sequence[torch.dtype] = ()) -> list[Program]:
    """Return the programs of common model shapes; without dtypes, those of every dtype."""
    dtypes = dtypes or list(DTYPES.values())
    return catalogue.list_programs(architecture, dtypes) if architecture in LIMITS else []


def _select_supported(
    architectures: Sequence[str], compiler: compile.Compiler
) -> tuple[list[str], list[str]]:
    """Return the architectures that can be compiled for, and an error for each of the others."""
    supported, refusals = [], []
    for architecture in dict.fromkeys(architectures):
        try:
            compiler.require(architecture)
            if architecture not in LIMITS:
                raise RuntimeError(
                    f"mvsplit_ops: --arch must be one of {', '.join(LIMITS)}, got {architecture}; "
                    "for other GPUs kernels are compiled at first use"
                )
            supported.append(architecture)
        except (RuntimeError, ValueError) as error:
            refusals.append(str(error))
    return supported, refusals


def _find_architectures() -> Sequence[str]:
    """Return the architectures of this machine's GPUs, or ARCHITECTURES without a GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    capabilities = {torch.cuda.get_device_capability(i) for i in range(count)}
    supported = [gpu.architecture(c) for c in sorted(capabilities) if c >= gpu.OLDEST_GPU]
    return supported or ARCHITECTURES


def _describe_devices() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    if _backends.find_missing("cpu", "rope", "cpu"):
        return name
    from mvsplit_ops import _C

    return f"CPU kernels for {_C.capability()} (of {', '.join(_C.capabilities())}), {name}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mvsplit_ops",
        description="Show which backend runs each operator here, and why the others cannot.",
    )
    commands = parser.add_subparsers(dest="command", metavar="[build]")
    command = commands.add_parser(
        "build",
        help="compile the CUDA kernels ahead of their first use",
        description="Compile the kernels of backend 'cuda' ahead of their first use, for machines "
        "that cannot or should not compile then. Needs no GPU. Kernels that are already there are "
        "not compiled again.",
    )
    command.add_argument(
        "--arch",
        nargs="+",
        metavar="SM",
        help="architectures, such as sm_90a (default: those of the GPUs of this machine, or "
        f"{' '.join(ARCHITECTURES)} if there are none)",
    )
    command.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        metavar="DTYPE",
        default=["bf16", "fp16", "fp32"],
        help=f"activation dtypes, of {', '.join(DTYPES)} (default: bf16 fp16 fp32)",
    )
    command.add_argument(
        "--cache",
        metavar="FOLDER",
        help="folder of the compiled kernels (default: ~/.cache/mvsplit_ops); a program that uses "
        "another calls mvsplit_ops._cuda.compile.use_cache(FOLDER)",
    )
    command.add_argument(
        "--compiler",
        choices=("nvrtc", "nvcc"),
        default="nvrtc",
        help="nvrtc (default) is the library that compiles at first use; the kernels of nvcc, "
        "which is part of a CUDA toolkit, also load on machines without a compiler, and are "
        "written to the installed package unless --cache is set",
    )
    return parser


if __name__ == "__main__":
    main()
