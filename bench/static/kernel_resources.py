"""Registers, spills, shared memory, access widths and occupancy of every kernel, as compiled.

Triton's kernels and the CUDA C++ ones are compiled for GPUs that need not be here, and their
machine code is read; how many blocks an SM holds at once follows from what a block takes of it.
"""

from dataclasses import asdict

from bench.cases import CASES
from bench.common import options as opt
from bench.common import records, text_tables
from bench.common.machine import describe_run
from bench.static import machine_code, occupancy

BACKENDS = tuple(machine_code.BACKENDS)
COLUMNS = (
    *("call", "backend", "kernel", "sm", "threads", "registers", "spill B", "shared B"),
    *("cluster", "blocks/SM", "limit", "warps %", "load bits", "store bits", "s"),
)


def measure(
    shape,
    backends=BACKENDS,
    architectures=machine_code.ARCHITECTURES,
    progress=lambda what, of: None,
    cases=CASES,
):
    """A record: "rows", a kernel each, and "missing", {backend: why it cannot be compiled here}.

    RuntimeError: no backend can be.
    """
    reasons = {backend: machine_code.missing(backend, architectures) for backend in backends}
    found = [backend for backend in backends if reasons[backend] is None]
    missing = {backend: reason for backend, reason in reasons.items() if reason}
    if not found:
        told = "; ".join(f"{backend}: {reason}" for backend, reason in missing.items())
        raise RuntimeError(f"no kernel can be compiled here: {told}")
    kernels = machine_code.measure(shape, found, architectures, progress, cases)
    ops = [case.op for case in cases]
    kernels.sort(key=lambda k: (*_place(k.call, ops), k.architecture, backends.index(k.backend)))
    compiler = machine_code.compiler().name if "cuda" in found else None
    return {
        "kind": "resources",
        "run": {**describe_run(shape), "cuda_compiler": compiler},
        "rows": [row(kernel) for kernel in kernels],
        "missing": missing,
    }


def row(kernel):
    """What a Kernel takes, and how many of its blocks an SM holds."""
    takes = kernel.architecture, kernel.registers, kernel.threads, kernel.shared
    blocks = occupancy.blocks_per_sm(*takes)
    return {
        **asdict(kernel),
        "blocks_per_sm": blocks,
        "limited_by": occupancy.limited_by(*takes),
        "warps_share": occupancy.warps_share(kernel.architecture, kernel.threads, blocks),
    }


def cells(record):
    """The table of a record: a tuple of strings for each kernel."""
    return [
        (
            *(r["call"], r["backend"], r["name"]),
            *(str(r[n]) for n in ("architecture", "threads", "registers", "spilled", "shared")),
            *(str(r["cluster"]), str(r["blocks_per_sm"]), r["limited_by"].removesuffix(" memory")),
            f"{100 * r['warps_share']:.0f}",
            _widths(r["loads"]) + (f" bulk x{r['bulk']}" if r["bulk"] else ""),
            *(_widths(r["stores"]), f"{r['seconds']:.1f}"),
        )
        for r in record["rows"]
    ]


def notes(record):
    """What a reader must know to read the table."""
    run, s = record["run"], record["run"]["shape"]
    found = {r["backend"] for r in record["rows"]}
    compilers = {"triton": f"Triton {run['triton']}", "cuda": run["cuda_compiler"]}
    return (
        f"B {s['B']}, T {'+'.join(map(str, s['segments']))}, D {s['D']}, H {s['H']}, F {s['F']}, "
        f"{s['dtype']}; compiled by {' and '.join(compilers[b] for b in BACKENDS if b in found)}.",
        "Blocks an SM and warps by calculation, from registers, threads and shared memory; "
        "clusters may find room for fewer.",
        "128x4: four accesses of 128 bits in the code, triton's in PTX, cuda's in machine code.",
        "s: seconds of the compiler; CUDA kernels of one program have one time.",
        *(f"{backend}: {reason}" for backend, reason in record["missing"].items()),
    )


def table(record):
    title = "Kernels as compiled"
    return text_tables.terminal(title, COLUMNS, cells(record), notes(record))


def _place(call, ops):
    op, direction = call.split()
    return ops.index(op), ("fwd", "bwd").index(direction)


def _widths(found):
    return " ".join(f"{bits}x{found[bits]}" for bits in sorted(found, key=int, reverse=True))


def options(p):
    opt.add_shape(p)
    opt.add_ops(p)
    known = ", ".join(map(str, occupancy.SMS))
    p.add_argument(
        "--arch",
        nargs="+",
        type=int,
        choices=occupancy.SMS,
        metavar="N",
        default=machine_code.ARCHITECTURES,
        help=f"compute capabilities, of {known}: 80 is A100, 90 H100 and H200, 100 B200",
    )
    p.add_argument(
        "--backend",
        nargs="+",
        choices=BACKENDS,
        metavar="BACKEND",
        default=BACKENDS,
        help=f"whose kernels, of {', '.join(BACKENDS)}",
    )
    opt.add_json(p)


def command(args):
    shape = opt.shape(args, "meta")
    opt.writable(args.json)
    with opt.progress("resources") as progress:
        record = measure(shape, args.backend, args.arch, progress, opt.chosen(args.op))
    opt.console().print(table(record))
    if args.json:
        records.append(record, args.json)
