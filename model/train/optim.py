"""AdamW with separate groups for matrices and gains, learning rate, averaged weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from model.config import Config


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of trainable parameters.

    Weight decay applies to matrices, which include the patch convolution, but not to gains and
    biases.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "gains and biases": []}
    for p in model.parameters():
        if p.requires_grad:
            groups["matrices" if p.dim() >= 2 else "gains and biases"].append(p)
    decay = {"matrices": weight_decay, "gains and biases": 0.0}
    return [
        {"params": params, "weight_decay": decay[name], "name": name}
        for name, params in groups.items()
    ]


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )


def learning_rate(config: Config, step: int) -> float:
    """Return the rate of update `step`, counted from 0: linear warm-up, then constant."""
    return config.lr * min(1.0, (step + 1) / max(config.warmup, 1))


class Average:
    """Exponential moving average of a model's parameters in float32; decay 0: no average."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = dict(model.named_parameters())
        start = {name: p.detach().float().clone() for name, p in self._live.items()}
        self.tensors = start if decay else {}

    @torch.no_grad()
    def restart(self) -> None:
        """Set the average to the model's current weights."""
        for name, average in self.tensors.items():
            average.copy_(self._live[name])

    @torch.no_grad()
    def update(self) -> None:
        """Add the model's current weights to the average."""
        if self.decay:
            live = [p.float() for p in self._live.values()]
            torch._foreach_lerp_(list(self.tensors.values()), live, 1 - self.decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights within the block, and restore its own afterwards."""
        own = {name: self._live[name].clone() for name in self.tensors}
        try:
            for name, average in self.tensors.items():
                self._live[name].copy_(average)
            yield
        finally:
            for name, p in own.items():
                self._live[name].copy_(p)
