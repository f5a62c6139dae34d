"""The record of `python -m bench traffic`, and its table."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.common import text_tables
from bench.common.records import Record
from bench.common.text_tables import NOTHING, Row, Table

PAPER_BLOCKS = 400  # blocks of the step whose calls are counted


@dataclass(frozen=True)
class TrafficCount:
    """One direction of one operator on one backend, in passes over a (B, T, D) activation."""

    op: str
    title: str
    direction: str  # fwd, bwd
    backend: str
    must_move: float
    read: float
    written: float
    launches: int
    calls: int  # in an optimizer step of PAPER_BLOCKS; 0: not in the total
    tensors: float | None = None  # the tensors of each launch, once; older records lack it

    @property
    def passes(self) -> float:
        return self.read + self.written

    @property
    def memory(self) -> float:
        """Passes that memory must serve if a cache serves what a launch loads again."""
        return self.passes if self.tensors is None else min(self.passes, self.tensors)


@dataclass(frozen=True)
class TrafficRecord(Record):
    """The counts of one run, and {backend: reason why it was not counted}."""

    kind = "traffic"
    rows: list[TrafficCount]
    missing: dict[str, str]

    @property
    def backends(self) -> list[str]:
        return list(dict.fromkeys(row.backend for row in self.rows))

    def step_passes(self, passes: Callable[[TrafficCount], float]) -> dict[str, float]:
        """Return {backend: passes(row), summed over a step}, for backends that have all of it."""
        step = {(row.op, row.direction) for row in self.rows if row.calls}
        totals = {}
        for backend in self.backends:
            rows = [row for row in self.rows if row.backend == backend and row.calls]
            if {(row.op, row.direction) for row in rows} == step:
                totals[backend] = sum(row.calls * passes(row) for row in rows)
        return totals


def format_cells(record: TrafficRecord) -> tuple[Row, list[Row], Row]:
    """Return columns, rows and the total: passes of each backend, and its launches in brackets.

    The total of a backend covers all operators of a step; it is empty if one was not counted.
    """
    backends = record.backends
    counts = {(row.op, row.direction, row.backend): row for row in record.rows}
    calls = {(row.op, row.direction): row for row in record.rows}
    rows: list[Row] = [
        (
            *(f"{row.title}, {row.direction}", f"{row.must_move:g}"),
            *(_format_count(counts.get((*call, backend))) for backend in backends),
        )
        for call, row in calls.items()
    ]
    must_move = sum(row.calls * row.must_move for row in calls.values())
    passes = record.step_passes(lambda row: row.passes)
    totals = (f"{passes[b]:,.0f}" if b in passes else NOTHING for b in backends)
    columns = "passes (launches)", "must move", *backends
    return columns, rows, (f"a step of {PAPER_BLOCKS} blocks", f"{must_move:,.0f}", *totals)


def make_table(record: TrafficRecord) -> Table:
    columns, rows, total = format_cells(record)
    return Table("Bytes moved by one call", columns, rows, format_notes(record), total)


def _format_count(row: TrafficCount | None) -> str:
    return f"{row.passes:.2f} ({row.launches})" if row else NOTHING


def format_notes(record: TrafficRecord) -> tuple[str, ...]:
    """Return the notes below the table: units, what is counted, and why a backend is missing."""
    memory = record.step_passes(lambda row: row.memory)
    once = ", ".join(f"{backend} {passes:,.0f}" for backend, passes in memory.items())
    return (
        f"{text_tables.shape_text(record.run['shape'])}. A pass reads or writes one (B, T, D) "
        "activation once; parameters, tables, means and partial sums are counted too.",
        "reference: the tensors of every operation of plain eager code, which computes in the "
        "dtype of its inputs; cpu: the tensors of a call, since a cache serves repeated reads; "
        "triton and cuda: every load and store of their kernels."
        + (" published: the same for erwold/mv-split." if "published" in record.backends else ""),
        "A step has 700 forward and 400 backward calls of RoPE + QK-Norm and of SwiGLU, and twice "
        "as many of MV-Split + RMSNorm." + _carried_mean_note(record),
        "Passes of a step that memory serves, if a cache serves what a launch loads again: "
        f"{once}.",
        *(f"{backend}: {reason}" for backend, reason in record.missing.items()),
    )


def _carried_mean_note(record: TrafficRecord) -> str:
    """Return the passes that Triton's merges save in a step if they carry the mean."""
    rows = [row for row in record.rows if row.backend == "triton"]
    plain = [row for row in rows if row.op == "mvsplit_rmsnorm"]
    carried = [row for row in rows if row.op == "mvsplit_rmsnorm_with_mean"]
    if not plain or not carried:
        return ""
    saved = sum((p.passes - c.passes) * p.calls for p, c in zip(plain, carried, strict=True))
    return f" Merges that carry the mean move {saved:,.0f} fewer passes in triton."
