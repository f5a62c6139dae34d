"""Tables of `python -m model info`: a configuration next to the paper's, the cost of a step."""

import dataclasses

from rich.table import Table

from model.config import FIELDS, Config
from model.train.memory import POLICIES, Plan, plan

GPU_COUNTS = (1, 8, 16)


def configuration_table(config: Config) -> Table:
    """Return every field with its value and the value that the paper states."""
    table = Table(title=f"configuration {config.hash}")
    for column in ("field", "value", "the paper", "meaning"):
        table.add_column(column, overflow="fold")
    for name, field in FIELDS.items():
        paper = field.metadata["paper"] or "[dim]not stated in the paper[/dim]"
        table.add_row(name, str(getattr(config, name)), paper, field.metadata["help"])
    return table


def cost_lines(config: Config, cost: Plan) -> list[str]:
    """Return the costs that do not depend on the checkpointing policy, one per line."""
    names = ("rope_qk_norm", "swiglu", "mvsplit_rmsnorm", "residual_rmsnorm")
    calls = [
        f"{name} {cost.calls[f'{name}_fwd']} + {cost.calls[f'{name}_bwd']}"
        for name in names
        if f"{name}_fwd" in cost.calls
    ]
    tokens = config.batch * sum(config.segments)
    weights = cost.parameters * (2 if config.precision == "bf16" else 4)
    return [
        f"{cost.parameters:,} parameters ({cost.parameters / 1e9:.4g} B)",
        f"step: {config.batch} samples, {tokens:,} tokens, in {cost.micro_batches} micro-batches",
        f"kernel calls of a micro-batch, forward + backward: {', '.join(calls)}",
        f"checkpoint: weights {format_bytes(weights)}, "
        f"with moments {format_bytes(weights + cost.moments)}",
    ]


def memory_table(config: Config) -> Table:
    """Return FLOPs per step and bytes per GPU under each checkpointing policy."""
    table = Table(title="one step under each checkpointing policy", caption_justify="left")
    table.add_column("checkpointing")
    for column in ("FLOPs per step", "activations", *(f"peak, {n} GPU" for n in GPU_COUNTS)):
        table.add_column(column, justify="right")
    for policy in dict.fromkeys((*POLICIES, config.checkpointing)):
        p = plan(dataclasses.replace(config, checkpointing=policy))
        name = f"[bold]{policy}[/bold]" if policy == config.checkpointing else policy
        peaks = [format_bytes(p.peak(n)) for n in GPU_COUNTS]
        table.add_row(name, f"{p.flops:.3e}", format_bytes(p.activations + p.working), *peaks)
    table.caption = (
        "FLOPs of matrix products and attention, including recomputation. Peaks assume weights, "
        "gradients and moments\nsharded over the GPUs and a micro-batch of "
        f"{config.micro_batch or config.batch} on each; this trainer uses one GPU."
    )
    return table


def format_bytes(n: float) -> str:
    """Return a number of bytes as text with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            break
        n /= 1000
    return f"{n:.4g} {unit}"
