"""A collapse to watch: Post-Norm, LayerScale and MV-Split trained side by side on the CPU."""

from model.config import CONTENDERS, UsageError
from model.stability.guard import LOCK_LAST, LOCKED
from model.stability.taps import tapped_layers
from model.train.runs import Job, train_all

SMOOTH = 10  # steps whose mean is shown as the loss


def run(preset, folder, overrides, show):
    """Train the contenders of a preset into folder/<residual>; returns {residual: rows of metrics}.

    show  called about twice a second with {residual: rows so far}
    """
    fixed = {"probes", *(name for fields in CONTENDERS.values() for name in fields)}
    given = sorted(fixed & overrides.keys())
    if given:
        raise UsageError(f"demo sets {', '.join(sorted(fixed))} itself, got {', '.join(given)}")
    jobs = {name: Job(preset, {**fields, **overrides}) for name, fields in CONTENDERS.items()}
    return train_all(jobs, folder, show)


def trivial_loss(dataset, n=256):
    """The loss of predicting 0, 1 + mean x0^2, over the first samples."""
    return 1 + sum(dataset.get(i)[0].square().mean().item() for i in range(n)) / n


def last_block(row, metric):
    """A metric at the deepest tapped block of a line of metrics; None where it is not finite."""
    values = row["layerwise"][metric]
    return values[max(values, key=int)]


def ratio(row):
    """G_mean / G_ctr of W_2 in the last block."""
    mean, centred = (last_block(row, f"{g}_ffn") for g in ("G_mean", "G_ctr"))
    return mean / centred if mean is not None and centred else None


def summary(name, rows):
    """What a contender did: (loss, TCS, rho, G_mean/G_ctr, seconds a step, verdict)."""
    recent = rows[-SMOOTH:]
    loss = sum(row["loss"] for row in recent) / len(recent)
    seconds = sorted(row["seconds_per_step"] for row in rows)[len(rows) // 2]
    locked = next((row["step"] for row in rows if row.get("guard") == LOCKED), None)
    verdict = f"locked at step {locked}" if locked else "trains"
    figures = (last_block(rows[-1], metric) for metric in ("tcs", "rho"))
    return loss, *figures, ratio(rows[-1]), seconds, verdict


def figure(table, depth, trivial, path):
    """Loss, TCS, rho and G_mean/G_ctr over the steps; `trivial`: see trivial_loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("loss", f"training loss, mean of {SMOOTH} steps", lambda r: r["loss"], "linear"),
        ("TCS", "token cosine similarity, last block", lambda r: last_block(r, "tcs"), "linear"),
        ("rho", "rho = |JX| / |PX|, last block", lambda r: last_block(r, "rho"), "log"),
        ("G", "G_mean / G_ctr of W_2, last block", ratio, "log"),
    )
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for (name, title, value, scale), axis in zip(panels, axes.flat, strict=True):
        for contender, rows in table.items():
            points = [(r["step"], value(r)) for r in rows if value(r) is not None]
            steps, values = zip(*points, strict=True)
            if name == "loss":
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


def _smooth(values):
    return [
        sum(values[max(0, i + 1 - SMOOTH) : i + 1]) / min(i + 1, SMOOTH) for i in range(len(values))
    ]
