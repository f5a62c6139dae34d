"""Tables for `python -m model info`: a configuration beside the paper's, what a step costs."""

import dataclasses

from rich.table import Table

from model.config import FIELDS
from model.train.memory import POLICIES, plan

GPUS = (1, 8, 16)


def configuration_table(config):
    """Every field, its value, and the paper's where it states one."""
    table = Table(title=f"configuration {config.hash}")
    for column in ("field", "value", "the paper", "meaning"):
        table.add_column(column, overflow="fold")
    for name, field in FIELDS.items():
        paper = field.metadata["paper"] or "[dim]not stated in the paper[/dim]"
        table.add_row(name, str(getattr(config, name)), paper, field.metadata["help"])
    return table


def cost_lines(config, here):
    """What holds for every policy, a line each; `here` is the plan of the configuration itself."""
    names = ("rope_qk_norm", "swiglu", "mvsplit_rmsnorm", "residual_rmsnorm")
    calls = [
        f"{name} {here.calls[f'{name}_fwd']} + {here.calls[f'{name}_bwd']}"
        for name in names
        if f"{name}_fwd" in here.calls
    ]
    tokens = config.batch * sum(config.segments)
    weights = here.parameters * (2 if config.precision == "bf16" else 4)
    return [
        f"{here.parameters:,} parameters ({here.parameters / 1e9:.4g} B)",
        f"{config.batch} samples, {tokens:,} tokens a step, in {here.micro_batches} micro-batches",
        f"calls of a micro-batch, forward + backward: {', '.join(calls)}",
        f"a checkpoint: weights {size(weights)}, with moments {size(weights + here.moments)}",
    ]


def memory_table(config):
    """Bytes a GPU and FLOPs a step under each checkpointing policy."""
    table = Table(title="a step under each checkpointing policy", caption_justify="left")
    table.add_column("checkpointing")
    for column in ("FLOPs a step", "activations", *(f"peak, {n} GPU" for n in GPUS)):
        table.add_column(column, justify="right")
    for policy in dict.fromkeys((*POLICIES, config.checkpointing)):
        p = plan(dataclasses.replace(config, checkpointing=policy))
        name = f"[bold]{policy}[/bold]" if policy == config.checkpointing else policy
        peaks = [size(p.peak(n)) for n in GPUS]
        table.add_row(name, f"{p.flops:.3e}", size(p.activations + p.working), *peaks)
    table.caption = (
        "FLOPs of matrix products and attention, recomputation included. Peaks with weights, "
        "gradients and moments\nshared out over the GPUs and a micro-batch of "
        f"{config.micro_batch or config.batch} on each; this trainer runs on one."
    )
    return table


def size(n):
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.4g} {unit}"
        n /= 1000
