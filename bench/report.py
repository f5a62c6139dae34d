"""Records as tables and pictures: on the terminal, and in the README."""

import json
from pathlib import Path

from bench import tables
from bench.profile import PAPER_MS, Profile
from bench.traffic import Count

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
PICTURE = RESULTS / "profile.svg"
MARKS = "<!-- bench {}: begin -->", "<!-- bench {}: end -->"

COLUMNS = (
    "operator",
    "calls fwd/bwd",
    "fwd ms eager/compile/fused",
    "bwd ms eager/compile/fused",
    "ms/step eager",
    "compile",
    "fused",
    "speed-up vs eager",
    "vs compile",
    "GB/s",
    "% of copy",
)


def cells(profile):
    """The table of a profile: a tuple of strings for each operator, then the totals."""
    rows = []
    for row in profile.rows:
        forward, backward = (
            " / ".join(f"{1e3 * row.seconds[n][i]:.3f}" for n in ("eager", "compile", "fused"))
            for i in (0, 1)
        )
        calls = f"{row.forward_calls} / {row.backward_calls}"
        title = f"({row.title})" if row.part_of else row.title
        speed = row.bytes_per_second("fused")
        rows.append((title, calls, forward, backward, *_summary(profile, row.ms_per_step, speed)))

    def total_ms(name):
        return profile.total(lambda row: row.ms_per_step(name))

    moved = profile.total(lambda r: r.bytes_per_second("fused") * r.ms_per_step("fused"))
    summary = _summary(profile, total_ms, moved / total_ms("fused"))
    return [*rows, ("total, this machine", "", "", "", *summary)]


def _summary(profile, ms, bytes_per_second):
    eager, compiled, fused = (ms(name) for name in ("eager", "compile", "fused"))
    return (
        f"{eager:.0f}",
        f"{compiled:.0f}",
        f"{fused:.0f}",
        f"{eager / fused:.2f}x",
        f"{compiled / fused:.2f}x",
        f"{bytes_per_second / 1e9:.1f}",
        f"{100 * bytes_per_second / profile.copy_bytes_per_second:.0f}%",
    )


def headline(profile):
    """Where and of what, in one line."""
    run, s = profile.run, profile.run["shape"]
    threads = f", {run['threads']} threads" if run["instruction_set"] else ""
    segments = "+".join(map(str, s["segments"]))
    return (
        f"{run['device']}{threads}, backend {run['backend']}"
        f"{' (' + run['instruction_set'] + ')' if run['instruction_set'] else ''}, "
        f"torch {run['torch']}; B {s['B']}, T {segments}, D {s['D']}, H {s['H']}, F {s['F']}, "
        f"{s['dtype']}; {run['blocks']} blocks, three of four checkpointed; "
        f"copy {profile.copy_bytes_per_second / 1e9:.1f} GB/s; {run['date']}, {run['commit']}"
    )


def notes(profile):
    """What a reader must know to read the table."""
    one_call = [profile.total(lambda r, n=n: r.call_ms(n)) for n in ("eager", "compile", "fused")]
    eager, compiled, fused = one_call
    paper = PAPER_MS["eager"], PAPER_MS["fused"]
    return (
        "Rows in brackets are replaced by RoPE + QK-Norm and not in the total. GB/s counts the "
        "bytes that the mathematics must move; the copy is of 256 MiB, while a call's tensors may "
        "stay in cache.",
        f"One forward and one backward call of each operator, summed: {eager:.2f} ms eager, "
        f"{compiled:.2f} ms torch.compile, {fused:.2f} ms fused: {eager / fused:.2f}x and "
        f"{compiled / fused:.2f}x.",
        f"The paper's own figures, on 8 H100 at its batch, not this machine: {paper[0]} ms eager, "
        f"{paper[1]} ms with its kernels, {paper[0] / paper[1]:.2f}x.",
    )


def print_table(profile, console):
    """The profile on a terminal."""
    *rows, total = cells(profile)
    console.print(headline(profile))
    title = "Operators per optimizer step"
    console.print(tables.terminal(title, COLUMNS, rows, notes(profile), total))


def traffic_cells(count):
    """Columns and rows: passes of every backend, and in brackets its launches."""
    backends = list(dict.fromkeys(row.backend for row in count.rows))
    found = {(row.op, row.direction, row.backend): row for row in count.rows}
    rows = []
    for op, direction, backend in found:
        if backend != backends[0]:
            continue
        of = [found[op, direction, b] for b in backends]
        passes = (f"{row.passes:.2f} ({row.launches})" for row in of)
        rows.append((f"{of[0].title}, {direction}", f"{of[0].must_move:g}", *passes))

    def step(value, backend):
        total = sum(row.calls * value(row) for row in count.rows if row.backend == backend)
        return f"{total:,.0f}"

    passes = (step(lambda row: row.passes, b) for b in backends)
    floor = step(lambda row: row.must_move, backends[0])
    total = ("a step of 400 blocks", floor, *passes)
    return ("passes (launches)", "must move", *backends), rows, total


def traffic_notes(count):
    """What a reader must know to read the table."""
    s = count.run["shape"]
    calls = {(row.op, row.direction): row.calls for row in count.rows}
    chained = "mvsplit_rmsnorm_with_mean"
    saved = sum(
        (row.passes if row.op == "mvsplit_rmsnorm" else -row.passes)
        * calls.get(("mvsplit_rmsnorm", row.direction), 0)
        for row in count.rows
        if row.backend == "triton" and row.op in ("mvsplit_rmsnorm", chained)
    )
    both = ("mvsplit_rmsnorm", "fwd") in calls and (chained, "fwd") in calls
    return (
        f"B {s['B']}, T {'+'.join(map(str, s['segments']))}, D {s['D']}, H {s['H']}, F {s['F']}, "
        f"{s['dtype']}. A pass reads or writes one (B, T, D) activation once; parameters, tables, "
        "means and partial sums are counted too.",
        "reference: the tensors of every eager operation; cpu: the tensors of a call, whose second "
        "reading comes from cache; triton and cuda: every load and store of their kernels.",
        "A step has 700 forward and 400 backward calls of RoPE + QK-Norm and of SwiGLU, and twice "
        "as many of MV-Split + RMSNorm."
        + (f" Merges that carry the mean move {saved:,.0f} passes less in triton." if both else ""),
    )


def traffic_table(count):
    columns, rows, total = traffic_cells(count)
    missing = (f"{backend}: {why}" for backend, why in count.missing.items())
    caption = *traffic_notes(count), *missing
    return tables.terminal("Bytes moved by one call", columns, rows, caption, total)


def kernel_table(kernels):
    """What compiling found, a row a kernel."""
    columns = (
        *("call", "kernel", "sm", "warps", "registers", "spilled B", "shared B"),
        *("load bits", "store bits", "barriers", "seconds"),
    )

    def widths(found):
        return " ".join(f"{bits}x{found[bits]}" for bits in sorted(found, reverse=True))

    rows = [
        (
            *(k.call, k.name, f"{k.architecture}", f"{k.warps}", f"{k.registers}", f"{k.spilled}"),
            *(f"{k.shared}", widths(k.loads), widths(k.stores), f"{k.barriers}"),
            f"{k.seconds:.1f}",
        )
        for k in kernels
    ]
    return tables.terminal("Triton kernels, compiled", columns, rows)


def append_json(record, path):
    """Add a record to a file, one JSON object a line; what the file holds stays."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def committed(kind="profile"):
    """Every committed record of a kind, oldest first."""
    lines = [line for p in sorted(RESULTS.glob("*.jsonl")) for line in p.read_text().splitlines()]
    records = [r for r in map(json.loads, lines) if r.get("kind", "profile") == kind]
    read = {"profile": Profile.from_json, "traffic": Count.from_json}[kind]
    return sorted(map(read, records), key=lambda record: record.run["date"])


def latest():
    """The newest committed profile of each device."""
    return list({p.run["device"]: p for p in committed()}.values())


def markdown(profile):
    """The README's section for one profile."""
    shown = (0, 1, 4, 5, 6, 7, 8, 9, 10)
    rows = [[c[i] for i in shown] for c in (COLUMNS, *cells(profile))]
    bullets = (f"- {note}" for note in notes(profile))
    table = tables.markdown(rows[0], rows[1:])
    return "\n".join([table, "", headline(profile) + ".", "", *bullets])


def readme_sections():
    """{name of a pair of marks in the README: what stands between them}."""
    parts = [f"![Milliseconds per step]({PICTURE.relative_to(README.parent)})"]
    sections = {"report": "\n\n".join(parts + [markdown(p) for p in latest()])}
    for count in committed("traffic")[-1:]:
        columns, rows, total = traffic_cells(count)
        bullets = (f"- {note}" for note in traffic_notes(count))
        table = tables.markdown(columns, [*rows, total])
        sections["traffic"] = "\n".join([table, "", *bullets])
    return sections


def write_readme():
    """Put the newest committed records into the README and draw them."""
    text = README.read_text()
    for name, section in readme_sections().items():
        begin, end = (mark.format(name) for mark in MARKS)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{section}\n{end}{rest.split(end)[1]}"
    README.write_text(text)
    draw(latest(), PICTURE)


def draw(profiles, path):
    """Bars: milliseconds per step of each operator, a panel for each device."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "mvsplit-ops"  # the same picture gives the same file
    figure, axes = plt.subplots(
        len(profiles), 1, figsize=(8, 3.2 * len(profiles)), squeeze=False, layout="constrained"
    )
    colours = {"eager": "#b8b8b8", "compile": "#7aa6c2", "fused": "#d9622b"}
    for axis, profile in zip(axes[:, 0], profiles, strict=True):
        rows = [r for r in profile.rows if r.part_of is None]
        for i, (name, colour) in enumerate(colours.items()):
            at = [k + (i - 1) * 0.27 for k in range(len(rows))]
            bars = axis.barh(at, [r.ms_per_step(name) for r in rows], 0.25, color=colour)
            label = {"compile": "torch.compile", "fused": "mvsplit_ops"}.get(name, name)
            bars.set_label(label)
            axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axis.set_yticks(range(len(rows)), [r.title for r in rows])
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("milliseconds per optimizer step (lower is better)")
        blocks, device = profile.run["blocks"], profile.run["device"]
        axis.set_title(f"{device}, backend {profile.run['backend']}, {blocks} blocks", fontsize=10)
        axis.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
