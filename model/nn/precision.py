"""Precision of the parameters and of the forward pass, by config.precision."""

from typing import TypeVar

import torch
from torch import nn

from model.config import Config

Model = TypeVar("Model", bound=nn.Module)


def in_precision(model: Model, config: Config) -> Model:
    """Convert a model in place: with bf16, linear and convolution layers become bfloat16.

    The gains of merges remain float32.
    """
    if config.precision == "bf16":
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                for name, p in list(module.named_parameters()):
                    setattr(module, name, nn.Parameter(p.detach().bfloat16()))
    return model


def autocast(config: Config, device: str | torch.device) -> torch.autocast:
    """Return the context for a forward pass: bfloat16 autocast with precision bf16-autocast."""
    enabled = config.precision == "bf16-autocast"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)
