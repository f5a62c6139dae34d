"""Profiles as tables and pictures: on the terminal, in the README, from the records of a run."""

import json
from pathlib import Path

from bench.profile import PAPER_MS, Profile

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
PICTURE = RESULTS / "profile.svg"
BEGIN, END = "<!-- bench report: begin -->", "<!-- bench report: end -->"

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
    from rich.table import Table

    table = Table(
        title="Operators per optimizer step",
        caption="\n".join(notes(profile)),
        caption_justify="left",
    )
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if i == 0 else "right")
    *rows, total = cells(profile)
    for row in rows:
        table.add_row(*row)
    table.add_section()
    table.add_row(*total, style="bold")
    console.print(headline(profile))
    console.print(table)


def append_json(profile, path):
    """Add the profile to a file of records, one JSON object a line; what the file holds stays."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(profile.to_json(), allow_nan=False) + "\n")


def committed():
    """Every committed profile, oldest first."""
    lines = [line for p in sorted(RESULTS.glob("*.jsonl")) for line in p.read_text().splitlines()]
    profiles = [Profile.from_json(json.loads(line)) for line in lines]
    return sorted(profiles, key=lambda p: p.run["date"])


def latest():
    """The newest committed profile of each device."""
    return list({p.run["device"]: p for p in committed()}.values())


def markdown(profile):
    """The README's section for one profile."""
    shown = (0, 1, 4, 5, 6, 7, 8, 9, 10)
    rows = [[c[i] for i in shown] for c in (COLUMNS, *cells(profile))]
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    rule = "|" + "|".join([" --- "] + [" ---: "] * (len(shown) - 1)) + "|"
    return "\n".join(
        [
            head,
            rule,
            *body,
            "",
            headline(profile) + ".",
            "",
            *(f"- {note}" for note in notes(profile)),
        ]
    )


def readme_section():
    parts = [f"![Milliseconds per step]({PICTURE.relative_to(README.parent)})"]
    return "\n\n".join(parts + [markdown(p) for p in latest()])


def write_readme():
    """Put the newest committed profiles into the README and draw them."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{readme_section()}\n{END}{after}")
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
