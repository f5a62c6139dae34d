"""Demonstration of a collapse: Post-Norm, LayerScale and MV-Split, trained on the CPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from model.config import CONTENDERS, UsageError
from model.data import Dataset
from model.stability.guard import LOCK_LAST, LOCKED
from model.stability.signals import MetricsRow
from model.stability.taps import tapped_layers
from model.train.runs import Job, Tables, train_all

SMOOTH_STEPS = 10  # over which the displayed loss is averaged


def run(
    preset: str, folder: Path, overrides: dict[str, Any], show: Callable[[Tables], None]
) -> Tables:
    """Train the contenders into folder/<residual>; return {residual: lines of metrics}.

    show  called about twice a second with the lines so far
    """
    fixed = {"probes", *(name for fields in CONTENDERS.values() for name in fields)}
    conflicts = sorted(fixed & overrides.keys())
    if conflicts:
        raise UsageError(
            f"demo sets {', '.join(sorted(fixed))} itself; remove {', '.join(conflicts)} from --set"
        )
    jobs = {name: Job(preset, {**fields, **overrides}) for name, fields in CONTENDERS.items()}
    return train_all(jobs, folder, show)


def trivial_loss(dataset: Dataset, n: int = 256) -> float:
    """Return the loss of predicting 0, which is 1 + mean x0^2, over the first n samples."""
    return 1 + sum(dataset.get(i)[0].square().mean().item() for i in range(n)) / n


def last_block(row: MetricsRow, metric: str) -> float | None:
    """Return a metric of the deepest tapped block; None if it is NaN or infinity."""
    values = row["layerwise"][metric]
    return values[max(values, key=int)]


def gradient_ratio(row: MetricsRow) -> float | None:
    """Return G_mean / G_ctr of W_2 in the last block."""
    mean, centred = (last_block(row, f"{g}_ffn") for g in ("G_mean", "G_ctr"))
    return mean / centred if mean is not None and centred else None


@dataclass(frozen=True)
class Summary:
    """State of a contender: metrics of the last block, and the guard's verdict."""

    loss: float  # mean of SMOOTH_STEPS
    tcs: float | None
    rho: float | None
    ratio: float | None  # G_mean / G_ctr of W_2
    seconds: float  # per step, median
    verdict: str


def summarize(rows: Sequence[MetricsRow]) -> Summary:
    """Return the state of a contender after its last line of metrics."""
    recent = rows[-SMOOTH_STEPS:]
    locked = next((row["step"] for row in rows if row.get("guard") == LOCKED), None)
    return Summary(
        loss=sum(row["loss"] for row in recent) / len(recent),
        tcs=last_block(rows[-1], "tcs"),
        rho=last_block(rows[-1], "rho"),
        ratio=gradient_ratio(rows[-1]),
        seconds=sorted(row["seconds_per_step"] for row in rows)[len(rows) // 2],
        verdict=f"locked at step {locked}" if locked else "trains",
    )


def make_table(tables: Tables, steps: int, trivial: float) -> Table:
    """Return the state of the contenders as a table for the terminal."""
    view = Table(
        caption=f"loss: mean of {SMOOTH_STEPS} steps (predicting 0: {trivial:.3f}); other columns: "
        "last block, last step"
    )
    for name in ("residual", "step", "loss", "TCS", "rho", "G_mean/G_ctr", "s/step", ""):
        view.add_column(name, justify="left" if name == "residual" else "right")
    for name, rows in tables.items():
        if not rows:
            view.add_row(name, "waiting", *[""] * 6)
            continue
        s = summarize(rows)
        figures = ("inf" if v is None else f"{v:.3g}" for v in (s.rho, s.ratio))
        tcs = "nan" if s.tcs is None else f"{s.tcs:.4f}"
        step = f"{rows[-1]['step']}/{steps}"
        view.add_row(name, step, f"{s.loss:.3f}", tcs, *figures, f"{s.seconds:.3f}", s.verdict)
    return view


def draw(tables: Tables, depth: int, trivial: float, path: Path) -> None:
    """Write a PNG of loss, TCS, rho and G_mean / G_ctr over the steps.

    trivial  the loss of predicting 0
    """
    import matplotlib  # here, because it is slow to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: list[tuple[str, Callable[[MetricsRow], float | None], str]] = [
        (f"training loss, mean of {SMOOTH_STEPS} steps", lambda r: r["loss"], "linear"),
        ("token cosine similarity, last block", lambda r: last_block(r, "tcs"), "linear"),
        ("rho = |JX| / |PX|, last block", lambda r: last_block(r, "rho"), "log"),
        ("G_mean / G_ctr of W_2, last block", gradient_ratio, "log"),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for (title, value, scale), axis in zip(panels, axes.flat, strict=True):
        for contender, rows in tables.items():
            points = [(r["step"], v) for r in rows if (v := value(r)) is not None]
            steps, values = zip(*points, strict=True)
            if axis is axes[0, 0]:
                values = _smooth(values)
            axis.plot(steps, values, label=contender, linewidth=1.6)
        axis.set(title=title, yscale=scale)
        axis.grid(alpha=0.3)
    axes[0, 0].axhline(trivial, color="black", linestyle=":", linewidth=1)
    axes[0, 0].annotate("predicting nothing", (0, trivial), xytext=(2, 3),
                        textcoords="offset points", fontsize=8)  # fmt: skip
    axes[0, 1].axhline(LOCK_LAST, color="black", linestyle=":", linewidth=1)
    for axis in axes[1]:
        axis.set_xlabel("optimizer step")
    axes[0, 1].legend()
    layers = tapped_layers(depth)
    figure.suptitle(f"{depth} blocks, block {layers[-1]} measured: does the token mean take over?")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smooth(values: Sequence[float]) -> tuple[float, ...]:
    """Return the trailing means over SMOOTH_STEPS."""
    windows = (values[max(0, i + 1 - SMOOTH_STEPS) : i + 1] for i in range(len(values)))
    return tuple(sum(window) / len(window) for window in windows)
