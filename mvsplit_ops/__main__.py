"""Which backend runs each operator here, and why another cannot; `build` compiles CUDA kernels."""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

import mvsplit_ops as mv
from mvsplit_ops import _backends
from mvsplit_ops._check import DTYPES

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")  # A100, H100 and H200, B200


def main(argv=None):
    arguments = _parser().parse_args(argv)
    if arguments.command == "build":
        sys.exit(build(arguments))
    report()


def report():
    state = mv.backends()
    print(f"mvsplit_ops {mv.__version__}, torch {torch.__version__}, {_device()}")
    print(f"default for cpu tensors: {_backends.DEFAULTS['cpu']}")
    for capability, default in _cuda_defaults():
        print(f"default for cuda tensors{capability}: {default}")
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


def _cuda_defaults():
    """(of which GPUs, the backends and what shows that they are the fastest)."""
    rows = {}
    for (capability, op), row in _backends.FASTEST.items():
        rows.setdefault(capability, {}).setdefault(row, []).append(op)
    backend = _backends.UNMEASURED[0]
    if not _backends.MEASURED:
        return [("", f"{backend} for every operator, until a measurement shows what is faster")]
    named = [
        (f" of compute capability {major}.{minor}", row) for (major, minor), row in rows.items()
    ]
    return [
        (
            where,
            "; ".join(
                f"{b} ({f or 'not measured'}): {', '.join(ops)}" for (b, f), ops in row.items()
            ),
        )
        for where, row in named
    ]


def build(arguments):
    """Compile what is not there yet, all that can be; the status to exit with."""
    from mvsplit_ops._cuda import compile

    prebuilt = arguments.compiler == "nvcc" and arguments.cache is None
    folder = compile.PREBUILT if prebuilt else arguments.cache or compile.cache()
    try:
        compiler = compile.nvcc() if arguments.compiler == "nvcc" else compile.nvrtc()
    except RuntimeError as error:
        return str(error)
    architectures, refusals = _compiled_for(arguments.arch or _architectures(), compiler)
    dtypes = [DTYPES[name] for name in dict.fromkeys(arguments.dtype)]
    jobs = [(p, arch) for arch in architectures for p in _programs(arch, dtypes)]
    print(f"{compiler.name}: {len(jobs)} programs, kept in {folder}", flush=True)

    def attempt(job):
        try:
            return compile.build(*job, compiler, folder)[1], None
        except RuntimeError as error:
            return False, str(error)

    compiled, failed, errors = 0, 0, dict.fromkeys(refusals)  # a folder's error comes once a job
    with ThreadPoolExecutor() as pool:
        outcomes = zip(jobs, pool.map(attempt, jobs), strict=True)
        for number, ((program, arch), (new, error)) in enumerate(outcomes, 1):
            word = "failed" if error else "compiled" if new else "present"
            defines = " ".join(program.defines)
            print(f"{number:4} {word:8} {arch:7} {program.source} {defines}", flush=True)
            compiled += new
            if error:
                failed += 1
                errors[error] = None
    for path in compile.outdated(folder, _programs) if prebuilt else ():
        path.unlink(missing_ok=True)
    there = len(jobs) - compiled - failed
    counts = f"{compiled} compiled, {there} there already"
    print(f"{counts}{f', {failed} failed' if failed else ''}: {folder}", flush=True)
    return "\n".join(errors) or 0


def _programs(architecture, dtypes=None):
    from mvsplit_ops._cuda import catalogue, launch

    dtypes = list(DTYPES.values()) if dtypes is None else dtypes
    return catalogue.programs(architecture, dtypes) if architecture in launch.LIMITS else []


def _compiled_for(architectures, compiler):
    """(architectures that can be compiled for, why each of the others cannot)"""
    from mvsplit_ops._cuda import launch

    known, refusals = [], []
    for architecture in dict.fromkeys(architectures):
        try:
            compiler.require(architecture)
            if architecture not in launch.LIMITS:
                names = ", ".join(launch.LIMITS)
                raise RuntimeError(
                    f"mvsplit_ops: what kernels need on {architecture} is known on such a GPU "
                    f"alone, at first use; --arch takes {names}"
                )
            known.append(architecture)
        except (RuntimeError, ValueError) as error:
            refusals.append(str(error))
    return known, refusals


def _architectures():
    """Those of the GPUs found, else those that clusters have."""
    from mvsplit_ops._cuda import gpu

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {torch.cuda.get_device_capability(i) for i in range(count)}
    return [gpu.architecture(c) for c in sorted(found) if c >= gpu.OLDEST_GPU] or ARCHITECTURES


def _device():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    if _backends.missing("cpu", "rope", "cpu"):
        return gpu
    from mvsplit_ops import _C

    return f"CPU kernels for {_C.capability()} (of {', '.join(_C.capabilities())}), {gpu}"


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m mvsplit_ops", description="Which backend runs each operator here."
    )
    commands = parser.add_subparsers(dest="command", metavar="[build]")
    command = commands.add_parser(
        "build",
        help="compile the CUDA kernels ahead of their first use",
        description="Compile the kernels of backend 'cuda' ahead of their first use, for machines "
        "that cannot or should not do it then. No GPU is needed. What is there is not compiled "
        "again.",
    )
    command.add_argument(
        "--arch",
        nargs="+",
        metavar="SM",
        help="architectures, such as sm_90a; those of the GPUs found, else "
        f"{', '.join(ARCHITECTURES)}, unless given",
    )
    command.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        metavar="DTYPE",
        default=["bf16", "fp16", "fp32"],
        help=f"of the activations, among {', '.join(DTYPES)}; bf16 fp16 fp32 unless given",
    )
    command.add_argument(
        "--cache",
        metavar="FOLDER",
        help="where to keep what is compiled, which a program is then told by "
        "mvsplit_ops._cuda.compile.use_cache; ~/.cache/mvsplit_ops unless given",
    )
    command.add_argument(
        "--compiler",
        choices=("nvrtc", "nvcc"),
        default="nvrtc",
        help="nvrtc, the default, is the library that would compile at first use; kernels of nvcc, "
        "a CUDA toolkit's, are found where neither is, and lie in the installed package unless "
        "--cache is given",
    )
    return parser


if __name__ == "__main__":
    main()
