"""Tables and plots of the newest records: report.md and report.html; in the README, its figures.

Of the records of this checkout, bench/results, it also writes the README's sections and picture. At
the end it tells where the backends that CUDA tensors take by default are not the fastest recorded.
"""

from pathlib import Path

from bench import cost, digest, predict, records, tables
from bench import options as opt
from bench.profile import PAPER_MS, Profile
from bench.traffic import Count

README = Path(__file__).parent.parent / "README.md"
PICTURE = records.RESULTS / "profile.svg"
NOTHING = "–"
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
    run = profile.run
    threads = f", {run['threads']} threads" if run["instruction_set"] else ""
    return (
        f"{run['device']}{threads}, backend {run['backend']}"
        f"{' (' + run['instruction_set'] + ')' if run['instruction_set'] else ''}, "
        f"torch {run['torch']}; {digest.shape_text(run['shape'])}; "
        f"{run['blocks']} blocks, three of four checkpointed; "
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
    """Columns and rows: passes of every backend, and in brackets its launches; – is not counted.

    The total of a backend is of all operators of a step, or is not there.
    """
    backends = list(dict.fromkeys(row.backend for row in count.rows))
    found = {(row.op, row.direction, row.backend): row for row in count.rows}
    calls = {(row.op, row.direction): row for row in count.rows}

    def cell(row):
        return f"{row.passes:.2f} ({row.launches})" if row else NOTHING

    rows = [
        (f"{of.title}, {of.direction}", f"{of.must_move:g}")
        + tuple(cell(found.get((*call, b))) for b in backends)
        for call, of in calls.items()
    ]

    floor = sum(calls[call].calls * calls[call].must_move for call in calls)
    passes = step_passes(count, lambda row: row.passes)
    shown = (f"{passes[b]:,.0f}" if b in passes else NOTHING for b in backends)
    totals = ("a step of 400 blocks", f"{floor:,.0f}", *shown)
    return ("passes (launches)", "must move", *backends), rows, totals


def step_passes(count, passes):
    """{backend: passes(row) of a step}, of the backends that have every operator of it."""
    step = {(row.op, row.direction) for row in count.rows if row.calls}
    totals = {}
    for backend in dict.fromkeys(row.backend for row in count.rows):
        rows = [row for row in count.rows if row.backend == backend and row.calls]
        if {(row.op, row.direction) for row in rows} == step:
            totals[backend] = sum(row.calls * passes(row) for row in rows)
    return totals


def traffic_notes(count):
    """What a reader must know to read the table."""
    calls = {(row.op, row.direction): row.calls for row in count.rows}
    chained = "mvsplit_rmsnorm_with_mean"
    saved = sum(
        (row.passes if row.op == "mvsplit_rmsnorm" else -row.passes)
        * calls.get(("mvsplit_rmsnorm", row.direction), 0)
        for row in count.rows
        if row.backend == "triton" and row.op in ("mvsplit_rmsnorm", chained)
    )
    counted = {row.op for row in count.rows if row.backend == "triton"}
    backends = {row.backend for row in count.rows}
    both = {"mvsplit_rmsnorm", chained} <= counted
    memory = step_passes(count, lambda row: row.memory)
    once = ", ".join(f"{backend} {passes:,.0f}" for backend, passes in memory.items())
    return (
        f"{digest.shape_text(count.run['shape'])}. A pass reads or writes one (B, T, D) activation "
        "once; parameters, tables, means and partial sums are counted too.",
        "reference: the tensors of every eager operation; cpu: the tensors of a call, whose second "
        "reading comes from cache; triton and cuda: every load and store of their kernels."
        + (" published: the same of erwold/mv-split." if "published" in backends else ""),
        "A step has 700 forward and 400 backward calls of RoPE + QK-Norm and of SwiGLU, and twice "
        "as many of MV-Split + RMSNorm."
        + (f" Merges that carry the mean move {saved:,.0f} passes less in triton." if both else ""),
        f"Of a step's passes memory serves, if what a launch loads again is in a cache: {once}.",
    )


def traffic_table(count):
    columns, rows, total = traffic_cells(count)
    missing = (f"{backend}: {why}" for backend, why in count.missing.items())
    caption = *traffic_notes(count), *missing
    return tables.terminal("Bytes moved by one call", columns, rows, caption, total)


def committed(kind="profile"):
    """Every committed record of a kind, oldest first."""
    read = {"profile": Profile.from_json, "traffic": Count.from_json}[kind]
    return [read(record) for record in records.read_folder(kind=kind)]


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
        sections["predict"] = _predicted()
    return sections


def _predicted():
    found = records.read_folder()
    speeds = {gpu: cost.bandwidth(gpu, found) for gpu in cost.DATASHEET}
    count, _ = cost.newest_count(found)
    columns, rows = predict.summary_cells(count, speeds)
    notes = [f"{gpu.upper()}: {speed.source}." for gpu, speed in speeds.items()]
    launch = 1e6 * cost.LAUNCH_SECONDS
    notes.append(
        f"{predict.TOKENS:,} tokens, {predict.PAPER_BLOCKS} blocks, {launch:g} us a launch, "
        "assumed. Calculated, not measured; python -m bench predict tells what it rests on."
    )
    return "\n".join([tables.markdown(columns, rows), "", *(f"- {note}" for note in notes)])


def write_readme():
    """Put the newest committed records into the README and draw them."""
    from bench import plots

    text = README.read_text()
    for name, section in readme_sections().items():
        begin, end = (mark.format(name) for mark in MARKS)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{section}\n{end}{rest.split(end)[1]}"
    README.write_text(text)
    plots.draw(latest(), PICTURE)


def text(found):
    """report.md: the tables of every kind."""
    from bench import page, sections

    shown = sections.sections(found)
    parts = [f"# {page.TITLE}", page.ABOUT, "## Machines", _section_table(sections.machines(found))]
    for section in shown:
        if section.tables:
            parts.append(f"## {section.title}")
        for table in section.tables:
            parts += [f"### {_plain(table.title)}", _section_table(table)]
    parts += [_plain(line) for line in page.absent(shown, found)]
    return "\n\n".join(parts) + "\n"


def _section_table(table):
    rows = [*table.rows, table.total] if table.total else table.rows
    columns, *rows = ([_plain(cell) for cell in row] for row in (table.columns, *rows))
    bullets = [f"- {_plain(note)}" for note in table.notes]
    bullets += [f"- Source: {_plain(source)}" for source in table.sources]
    return "\n".join([tables.markdown(columns, rows), "", *bullets])


def _plain(line):
    """One line of Markdown that shows these characters."""
    return " ".join(line.replace("|", "\\|").replace("<", "&lt;").split())


def write(folder, out):
    """report.md and report.html of a folder's records; of the committed ones, the README too."""
    from bench import page

    found = digest.read(folder)
    if not out.is_dir():
        raise ValueError(f"--out: no folder {out}; make it first")
    written = [out / "report.md", out / "report.html"]
    for path, content in zip(written, (text(found), page.html(found)), strict=True):
        path.write_text(content, encoding="utf-8")
    committed = _committed(folder)
    if committed:
        write_readme()
        written += [README, PICTURE]
    return written, digest.disagreements(found, committed)


def _committed(folder):
    return Path(folder).resolve() == records.RESULTS.resolve()


def options(p):
    p.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=records.RESULTS,
        metavar="DIR",
        help="folder of records, *.jsonl",
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where report.md and report.html go (default: DIR)",
    )


def command(args):
    written, lines = write(args.folder, args.out or args.folder)
    console = opt.console()
    for line in (*(f"wrote {path}" for path in written), *lines):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
