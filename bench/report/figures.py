"""Which records each plot of report.html shows, and what stands above and below it."""

from dataclasses import dataclass

from bench.cases import PAPER_MS
from bench.common import text_tables
from bench.report import plots, select, tables
from bench.static.traffic import TrafficRecord


@dataclass(frozen=True)
class Picture:
    """A title, a figure, and a caption: what it shows, then a line for each source."""

    title: str
    figure: object
    text: str
    sources: tuple


def pictures(found):
    """Every plot that the records give."""
    profiles = select.profiles(found)
    sweeps = select.by_widths(found).values()
    return [
        *(_speed_up(*p) for p in profiles if _eager(p[0])),
        *(_roofline(*p) for p in profiles if p[1][0].kind == "profile"),
        *(_sweep_bandwidth(of) for of in sweeps if _lines(of)),
        *(_steps(f) for f in select.newest(found, "step")),
        *(_sweep_time(of) for of in sweeps if _lines(of)),
        *(picture for f in select.newest(found, "in_loop") for picture in _in_loop(f)),
        *(_traffic(f) for f in select.newest(found, "traffic")),
        *(_predicted(*of) for of in tables.predictions(found)),
    ]


def _eager(profile):
    return any(len(row.seconds) > 1 and "eager" in row.seconds for row in profile.rows)


def _speed_up(profile, found):
    values = {
        row.title: {
            name: row.ms_per_step("eager") / row.ms_per_step(name)
            for name in row.seconds
            if name != "eager"
        }
        for row in profile.rows
        if "eager" in row.seconds
    }
    ops = [f for f in found if f.kind == "ops"]
    beside = "Beside peers, s" if ops else "S"
    text = (
        "700 forward to 400 backward calls of each operator, the mix of a step with three of four "
        f"blocks recomputed, at {text_tables.shape_text(profile.run['shape'])}. Longer is faster."
    )
    return Picture(
        f"{beside}peed-up over eager PyTorch, {profile.run['device']}",
        plots.bars(values, "times faster than eager PyTorch", (1, "eager = 1")),
        " ".join((text, *(f"{reason}." for reason in select.failures(ops, missing=False)))),
        tables.sources(found),
    )


def _roofline(profile, found):
    def speed(row, name):
        return sum(row.bytes) / (row.call_ms(name) / 1e3)

    points = {
        row.title: {n: (sum(row.bytes) / 1e6, speed(row, n) / 1e9) for n in row.seconds}
        for row in profile.rows
    }
    copy = profile.copy_bytes_per_second / 1e9
    return Picture(
        f"Against the copy bandwidth, {profile.run['device']}",
        plots.roofline(
            points,
            (copy, f"copy, {copy:.4g} GB/s"),
            "MB that a forward and a backward must move",
            "GB/s on those bytes",
        ),
        "What an operator would reach that moves nothing but what the mathematics must move, as "
        f"fast as memory is copied, is the dashed line. {text_tables.shape_text(profile.run['shape'])}; "
        "small tensors may stay in cache.",
        tables.sources(found),
    )


def _lines(group):
    """{operator: {implementation: [(record, its column)]}}, where two sizes or more were timed."""
    found = {}
    for f in group:
        for name, column in select.timed(f).items():
            found.setdefault(f.record["title"], {}).setdefault(name, []).append((f, column))
    sizes = {}
    for f in group:
        sizes.setdefault(f.record["title"], set()).add(select.tokens(f.run["shape"]))
    return {title: lines for title, lines in found.items() if len(sizes[title]) > 1}


def _panels(group, point):
    return {
        title: {name: [point(f, column) for f, column in of] for name, of in lines.items()}
        for title, lines in _lines(group).items()
    }


def _sweep_bandwidth(group):
    def point(f, column):
        moved = sum(f.record["must_move"])
        return moved / 1e6, moved / column["seconds"][-1] / 1e9

    copy = max(f.record["copy_bytes_per_second"] for f in group) / 1e9
    return Picture(
        f"Bandwidth over sizes, {group[0].device}",
        plots.curves(
            _panels(group, point),
            "MB that a forward and a backward must move",
            "GB/s on those bytes",
            (copy, f"copy, {copy:.4g} GB/s"),
            log=False,
        ),
        f"Forward and backward together; {text_tables.width_text(group[0].run['shape'])}. The dashed "
        "line is the copy bandwidth measured in the same run.",
        tables.sources(group),
    )


def _sweep_time(group):
    def point(f, column):
        return select.tokens(f.run["shape"]), 1e3 * column["seconds"][-1]

    return Picture(
        f"Time over tokens, {group[0].device}",
        plots.curves(_panels(group, point), "tokens of a call", "ms, forward and backward"),
        f"{text_tables.width_text(group[0].run['shape'])}; both axes in powers. Lower is faster.",
        tables.sources(group),
    )


def _steps(found):
    rows = []
    for row in found.record["rows"]:
        names = (row.get(n) for n in ("residual", "implementation", "checkpointing"))
        parts = row.get("breakdown") or {"not taken apart": row["gradients"] + row["update"]}
        label = ", ".join(str(name) for name in names if name)
        rows.append((label, {part: 1e3 * s for part, s in parts.items()}))
    return Picture(
        f"Where a step's time goes, {found.run['preset']}, {found.device}",
        plots.stacked(rows, "ms per optimizer step"),
        f"{tables.run_text(found.run)}. A row for each residual, implementation and "
        "checkpointing policy. Parts are of a profiled step, gaps what a step that is not has "
        "beyond them.",
        tables.sources([found]),
    )


def _in_loop(found):
    values = {}
    for row in found.record["rows"]:  # RoPE and QK-Norm, where they are two, as the one they make
        title = select.CASE[select.CASE[row["op"]].part_of or row["op"]].title
        bars, name = values.setdefault(title, {}), row["implementation"]
        bars[name] = bars.get(name, 0.0) + row["forward_ms"] + row["backward_ms"]
    values["all operators"] = tables.in_loop_totals(found)
    yield Picture(
        f"Operators within a training step, {found.run['preset']}, {found.device}",
        plots.bars(values, "ms per optimizer step"),
        f"{tables.run_text(found.run)}. Self time on the device, forward and backward, whole "
        "steps running. Shorter is faster.",
        tables.sources([found]),
    )
    if found.gpu:
        paper = {"eager": PAPER_MS["eager"], "published": PAPER_MS["fused"]}
        yield Picture(
            "The paper, 8 H100, its batch",
            plots.bars({"all operators": paper}, "ms per optimizer step"),
            "arXiv 2605.06169, 400 blocks: not this machine, not this batch; here for its ratio.",
            (),
        )


def _traffic(found):
    count = TrafficRecord.from_json(found.record)
    rows = {}
    for row in count.rows:
        key = f"{row.title}, {row.direction}"
        rows.setdefault(key, (key, row.must_move, {}))[2][row.backend] = row.passes
    missing = (f"{backend}: {why}." for backend, why in count.missing.items())
    text = (
        f"{text_tables.shape_text(count.run['shape'])}. Read and written, counted and not timed; the "
        "horizontal axis is in powers."
    )
    return Picture(
        "Bytes moved by a call",
        plots.dots(list(rows.values()), "passes over a (B, T, D) activation"),
        " ".join((text, *missing)),
        tables.sources([found]),
    )


def _predicted(title, rows, notes, of):
    values = {row.title: row.ms for row in rows}
    values["all operators"] = {n: sum(row.ms[n] for row in rows) for n in rows[0].ms}
    return Picture(
        f"Milliseconds of a step, {title}",
        plots.bars(values, "ms per optimizer step, calculated"),
        f"Not measured: counted bytes over a bandwidth, and a cost for each launch. {notes[0]}",
        of,
    )
