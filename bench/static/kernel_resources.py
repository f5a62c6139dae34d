"""Registers, spills, shared memory, access widths and occupancy of every compiled kernel.

The Triton and CUDA C++ kernels are compiled for GPUs that need not be present, and their machine
code is read. The number of blocks that an SM holds is calculated from the resources of a block.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.cases import CASES, Case, Shape
from bench.common import options as opt
from bench.common import records, text_tables
from bench.common.machine import describe_run
from bench.common.records import Record, Run
from bench.common.text_tables import Row, Table
from bench.static import kernel_compiler
from bench.static.kernel_compiler import ARCHITECTURES, CompiledKernel
from bench.static.occupancy import RESIDENCY

COMPILED_BACKENDS = tuple(kernel_compiler.COMPILERS)
RESOURCE_COLUMNS = (
    *("call", "backend", "kernel", "sm", "threads", "registers", "spill B", "shared B"),
    *("cluster", "blocks/SM", "limit", "warps %", "load bits", "store bits", "s"),
)


@dataclass(frozen=True)
class ResourceRecord(Record):
    """The kernels of one run, and {backend: reason why it cannot be compiled here}."""

    kind = "resources"
    rows: list[CompiledKernel]
    missing: dict[str, str]


def measure(
    shape: Shape,
    backends: Sequence[str] = COMPILED_BACKENDS,
    architectures: Sequence[int] = ARCHITECTURES,
    progress: opt.ReportProgress = opt.no_progress,
    cases: Sequence[Case] = CASES,
) -> ResourceRecord:
    """Compile the kernels of every backend that can be compiled, and return their resources.

    RuntimeError: no backend can be compiled here.
    """
    reasons = {b: kernel_compiler.missing_reason(b, architectures) for b in backends}
    missing = {b: reason for b, reason in reasons.items() if reason}
    available = [b for b in backends if b not in missing]
    if not available:
        lines = "; ".join(f"{backend}: {reason}" for backend, reason in missing.items())
        raise RuntimeError(f"no kernel can be compiled here: {lines}")
    kernels = kernel_compiler.compile_kernels(shape, available, architectures, progress, cases)
    compiler = kernel_compiler.select_compiler().name if "cuda" in available else None
    run: Run = {**describe_run(shape), "cuda_compiler": compiler}
    return ResourceRecord(run, kernels, missing)


def format_cells(record: ResourceRecord) -> list[Row]:
    """Return the rows below RESOURCE_COLUMNS, one per kernel."""
    return [
        (
            *(row.call, row.backend, row.name, str(row.architecture), str(row.threads)),
            *(str(row.registers), str(row.spilled), str(row.shared), str(row.cluster)),
            *(str(row.blocks_per_sm), row.limited_by.removesuffix(" memory")),
            f"{100 * row.warps_share:.0f}",
            _format_accesses(row.loads) + (f" bulk x{row.bulk}" if row.bulk else ""),
            *(_format_accesses(row.stores), f"{row.seconds:.1f}"),
        )
        for row in record.rows
    ]


def _format_accesses(counts: Mapping[int, int]) -> str:
    return " ".join(f"{bits}x{counts[bits]}" for bits in sorted(counts, reverse=True))


def format_notes(record: ResourceRecord) -> tuple[str, ...]:
    """Return the notes below the table: shape, compilers, how the columns are computed."""
    run, backends = record.run, {row.backend for row in record.rows}
    compilers = {"triton": f"Triton {run['triton']}", "cuda": run["cuda_compiler"]}
    names = " and ".join(str(compilers[b]) for b in COMPILED_BACKENDS if b in backends)
    return (
        f"{text_tables.shape_text(run['shape'])}; compiled by {names}.",
        "Blocks per SM and warps are calculated from registers, threads and shared memory; fewer "
        "blocks may fit if they are in clusters.",
        "128x4: four accesses of 128 bits in the code, PTX for triton, machine code for cuda.",
        "s: seconds of the compiler; the CUDA kernels of one program share one time.",
        *(f"{backend}: {reason}" for backend, reason in record.missing.items()),
    )


def make_table(record: ResourceRecord) -> Table:
    return Table("Compiled kernels", RESOURCE_COLUMNS, format_cells(record), format_notes(record))


def add_options(parser: argparse.ArgumentParser) -> None:
    opt.add_shape(parser)
    opt.add_ops(parser)
    known = ", ".join(map(str, RESIDENCY))
    parser.add_argument(
        "--arch",
        nargs="+",
        type=int,
        choices=RESIDENCY,
        metavar="N",
        default=ARCHITECTURES,
        help=f"compute capabilities, of {known}: 80 is A100, 90 is H100 and H200, 100 is B200",
    )
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=COMPILED_BACKENDS,
        metavar="BACKEND",
        default=COMPILED_BACKENDS,
        help=f"backends to compile, of {', '.join(COMPILED_BACKENDS)}",
    )
    opt.add_json(parser)


def run_command(args: argparse.Namespace) -> None:
    shape = opt.chosen_shape(args, "meta")
    with opt.show_progress("resources") as progress:
        record = measure(shape, args.backend, args.arch, progress, opt.chosen_cases(args.op))
    opt.make_console().print(make_table(record).to_terminal())
    records.append(record.to_json(), args.json)
