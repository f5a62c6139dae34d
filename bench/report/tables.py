"""The tables of report.md and report.html: a section for each kind of record, as text."""

from dataclasses import dataclass

from bench.cases import PAPER_MS
from bench.common import text_tables
from bench.common.text_tables import NOTHING
from bench.measure import profile as profiles
from bench.measure.profile import Profile
from bench.report import select
from bench.static import kernel_resources, predict, roofline, traffic
from bench.static.traffic import TrafficRecord


@dataclass(frozen=True)
class Table:
    """Strings: a row each; notes and sources are lines below it, total a last row apart."""

    title: str
    columns: tuple
    rows: list
    notes: tuple = ()
    sources: tuple = ()
    total: tuple | None = None


@dataclass(frozen=True)
class Section:
    """The tables of a kind, or none and the command that makes its records."""

    kind: str
    title: str
    command: str
    tables: list[Table]


# kind: (title, the command that makes a record)
KINDS = {
    "profile": ("Operators per optimizer step", "profile --json FILE"),
    "ops": ("Operators over shapes, beside their peers", "ops --json FILE"),
    "in_loop": ("Operators within training steps", "profile --in-loop --json FILE"),
    "step": ("Whole optimizer steps", "step --json FILE"),
    "traffic": ("Bytes moved by one call", "traffic --json FILE"),
    "predict": ("A step by calculation, and what was measured", "traffic --json FILE"),
    "machine": ("What the machine can do at best", "machine --json FILE"),
    "resources": ("Kernels as compiled", "resources --json FILE"),
}


def sections(found):
    """Every kind, in order; those without a record have no tables."""
    make = {
        "profile": _profile,
        "in_loop": _in_loop,
        "step": _step,
        "traffic": _traffic,
        "machine": _machine,
        "resources": _resources,
    }
    tables = {kind: [of(f) for f in select.newest(found, kind)] for kind, of in make.items()}
    tables["predict"] = _predicted(found)
    tables["ops"] = [_ops(of) for group in select.by_widths(found).values() for of in _by_op(group)]
    return [
        Section(kind, title, f"python -m bench {command}", tables[kind])
        for kind, (title, command) in KINDS.items()
    ]


def unknown(found):
    """Kinds that no section shows."""
    return sorted({f.kind for f in found} - set(KINDS))


def machines(found):
    """Every device that was measured, as the newest of its records that are shown describe it."""
    shown = [f for kind in KINDS for f in select.newest(found, kind) if f.device]
    shown.sort(key=lambda f: f.run["date"])
    told, newest = {}, {}
    for f in shown:
        told.setdefault(f.device, {}).update({name: of for name, of in f.run.items() if of})
        newest[f.device] = f
    columns = "device", "capability", "instruction set", "driver", "torch", "triton", "python"
    names = "instruction_set", "driver", "torch", "triton", "python"
    rows = [
        (
            device,
            ".".join(map(str, run.get("capability", ()))) or NOTHING,
            *(str(run.get(name, NOTHING)) for name in names),
        )
        for device, run in told.items()
    ]
    return Table("Machines", columns, rows, sources=sources(newest.values()))


def sources(found):
    return tuple(select.origins(found))


def times(seconds, base):
    """How many times faster than `base`."""
    return f"{base / seconds:.2f}x" if base else NOTHING


def scaled(value, scale, digits=1):
    return NOTHING if value is None else f"{value / scale:,.{digits}f}"


def _profile(found):
    profile = Profile.from_json(found.record)
    *rows, total = profiles.cells(profile)
    title = f"{found.device}, backend {found.run['backend']}"
    notes = profiles.headline(profile), *profiles.notes(profile)
    return Table(title, profiles.COLUMNS, rows, notes, sources([found]), total)


def _by_op(group):
    ops = dict.fromkeys(f.record["op"] for f in group)
    return [[f for f in group if f.record["op"] == op] for op in ops]


def _ops(group):
    """One operator over its shapes: a row for each shape and implementation."""
    columns = (
        *("shape", "implementation", "forward us", "backward us", "both us", "host us"),
        *("launches fwd/bwd", "GB/s", "% of copy", "vs eager"),
    )
    rows = [row for f in group for row in _columns(f)]
    first = group[0]
    notes = (
        f"{text_tables.width_text(first.run['shape'])}; {_methods(group)}. GB/s counts the bytes that "
        "the mathematics must move in a forward and a backward, of the copy bandwidth measured in "
        "the same run; host us: of the CPU, in a forward call on one token.",
        *select.failures(group),
    )
    title = f"{first.record['title']}, {first.device}"
    return Table(title, columns, rows, notes, sources(group))


def _methods(group):
    """How the columns were timed; whose, where not all were timed alike."""
    names = {}
    for f in group:
        for name, column in select.timed(f).items():
            method = column.get("method") or f.run.get("method")
            how = f"{method}, medians of {f.run.get('repeats')}"
            names.setdefault(how, {})[name] = None
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{', '.join(of)}: {how}" for how, of in names.items())


def _columns(found):
    """A row for each implementation at one shape, those that failed at the end."""
    record = found.record
    size, moved = text_tables.size_text(found.run["shape"]), sum(record["must_move"])
    eager = select.timed(found).get("eager", {}).get("seconds", (None,))[-1]
    for name, column in select.timed(found).items():
        seconds = column["seconds"]
        launches = column.get("launches")
        speed = moved / seconds[-1]
        yield (
            *(size, name, *(scaled(s, 1e-6) for s in (*seconds, column.get("host_seconds")))),
            " / ".join(map(str, launches)) if launches else NOTHING,
            f"{speed / 1e9:.1f}",
            f"{100 * speed / record['copy_bytes_per_second']:.0f}%",
            times(seconds[-1], eager),
        )
    for name in select.failed(found):
        yield size, name, "failed", *(NOTHING,) * 7


def _in_loop(found):
    rows, step_ms = found.record["rows"], found.record["step_ms"]
    columns = (
        *("operator", "implementation", "calls fwd/bwd", "forward ms/step", "backward ms/step"),
        "both ms/step",
    )
    cells = [
        (
            *(row["title"], row["implementation"]),
            f"{row['forward_calls']} / {row['backward_calls']}",
            *(f"{row[n]:.2f}" for n in ("forward_ms", "backward_ms")),
            f"{row['forward_ms'] + row['backward_ms']:.2f}",
        )
        for row in rows
    ]
    totals = in_loop_totals(found)
    for name, total in totals.items():
        cells.append(("all operators", name, "", "", "", f"{total:.2f}"))
    whole = ", ".join(f"{name} {value:.1f} ms" for name, value in step_ms.items())
    notes = [
        f"{run_text(found.run)}. Self time of the operators on the device within whole training "
        f"steps; a whole step: {whole}."
    ]
    for name in select.OURS:
        if name in totals and "eager" in totals:
            speed = times(totals[name], totals["eager"])
            notes.append(f"Operators on {name}: {speed} faster than eager PyTorch.")
    if found.gpu:
        notes.append(
            f"The paper's own figures, on 8 H100 at its batch, not this machine: "
            f"{PAPER_MS['eager']} ms eager, {PAPER_MS['fused']} ms with its kernels."
        )
    title = f"{found.run['preset']}, {found.device}"
    return Table(title, columns, cells, tuple(notes), sources([found]))


def in_loop_totals(found):
    """{implementation: ms per step of all operators}"""
    totals = {}
    for row in found.record["rows"]:
        both = row["forward_ms"] + row["backward_ms"]
        totals[row["implementation"]] = totals.get(row["implementation"], 0.0) + both
    return totals


def run_text(run):
    """The preset of a run of training steps, and what of it decides the time of a step."""
    names = "depth", "dim", "heads", "ffn", "batch", "precision"
    config = (f"{n} {run['config'][n]}" for n in names if n in run.get("config", {}))
    return ", ".join((run["preset"], *config))


def _step(found):
    rows, rate = found.record["rows"], found.run.get("matmul_flops_per_second")
    parts = list(dict.fromkeys(part for row in rows for part in row.get("breakdown") or ()))
    columns = (
        *("residual", "implementation", "checkpointing", "loader ms", "gradients ms", "update ms"),
        *("step ms", "tokens/s", "TFLOP/s", "% of matmul", "peak GB"),
        *(f"{part} ms" for part in parts),
    )
    cells = []
    for row in rows:
        step = row["gradients"] + row["update"]
        speed = row["flops"] / step if row.get("flops") else None
        breakdown = row.get("breakdown") or {}
        cells.append(
            (
                *(row["residual"], row["implementation"]),
                str(row.get("checkpointing") or NOTHING),
                *(
                    scaled(t, 1e-3)
                    for t in (row.get("loader"), row["gradients"], row["update"], step)
                ),
                scaled(row.get("tokens_per_second"), 1, 0),
                scaled(speed, 1e12, 3),
                f"{100 * speed / rate:.0f}%" if speed and rate else NOTHING,
                scaled(row.get("peak_bytes"), 1e9, 2),
                *(scaled(breakdown.get(part), 1e-3) for part in parts),
            )
        )
    repeats = f"; medians of {found.run['repeats']} steps" if "repeats" in found.run else ""
    notes = (
        f"{run_text(found.run)}{repeats}. The loader's time is not in a step's. % of matmul: of "
        "the rate of a matrix product measured in the same run. The parts are of a profiled "
        "step, launch gaps what a step that is not has beyond them.",
    )
    title = f"{found.run['preset']}, {found.device}"
    return Table(title, columns, cells, notes, sources([found]))


def _traffic(found):
    count = TrafficRecord.from_json(found.record)
    columns, rows, total = traffic.traffic_cells(count)
    missing = (f"{backend}: {why}" for backend, why in count.missing.items())
    notes = *traffic.traffic_notes(count), *missing
    title = text_tables.size_text(count.run["shape"])
    return Table(title, columns, rows, notes, sources([found]), total)


def predictions(found):
    """(title, rows, notes, sources) on each GPU of a datasheet, where a step is counted."""
    shown = [f.record for f in found]
    if not roofline.whole_counts(shown):
        return
    count, counted = roofline.newest_count(shown)
    of = sources([f for f in found if f.run in counted.values()])
    for gpu in roofline.DATASHEET:
        speed = roofline.bandwidth(gpu, shown)
        rows = predict.predict(count, predict.TOKENS, speed.bytes_per_second)
        notes = predict.prediction_notes(count, counted, speed, roofline.LAUNCH_SECONDS)
        yield f"{gpu.upper()}, {predict.TOKENS:,} tokens, by calculation", rows, notes, of


def _predicted(found):
    tables = []
    for title, rows, notes, of in predictions(found):
        columns, body, total = predict.prediction_cells(rows)
        tables.append(Table(title, columns, body, notes, of, total))
    if tables:
        shown = [f.record for f in found]
        compared = predict.compare(predict.newest(shown), roofline.newest_count(shown)[0])
        for device, of in predict.by_device(compared).items():
            columns, cells = predict.comparison_cells(of)
            title = f"Measured beside predicted, {device}"
            tables.append(Table(title, columns, cells, predict.COMPARED, tables[0].sources))
    return tables


def _machine(found):
    record = found.record
    columns = "", "copy GB/s", f"matrix product TFLOP/s, {record['matmul_dtype']}"
    rates = (
        scaled(record["copy_bytes_per_second"], 1e9),
        scaled(record["matmul_flops_per_second"], 1e12, 3),
    )
    rows = [(found.device, *rates)]
    notes = ("A copy counts the bytes that it reads and those that it writes.",)
    return Table(f"{found.device}", columns, rows, notes, sources([found]))


def _resources(found):
    shape = text_tables.shape_text(found.run["shape"])
    cells, notes = kernel_resources.cells(found.record), kernel_resources.notes(found.record)
    return Table(shape, kernel_resources.COLUMNS, cells, notes, sources([found]))
