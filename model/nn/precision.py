"""The precision of the parameters and of the forward pass, as config.precision names it."""

import torch
from torch import nn


def in_precision(model, config):
    """With precision bf16: matrices and biases bfloat16, the gains of merges float32."""
    if config.precision == "bf16":
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                for name, p in list(module.named_parameters()):
                    setattr(module, name, nn.Parameter(p.detach().bfloat16()))
    return model


def autocast(config, device):
    """The precision of a forward pass, a context."""
    enabled = config.precision == "bf16-autocast"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)
