"""AdamW with parameters grouped by what they are, the learning rate, the average of weights."""

import contextlib

import torch


def parameter_groups(model, weight_decay):
    """Matrices decay (the patch convolution is one), gains and biases do not; frozen: neither."""
    groups = {"matrices": [], "gains and biases": []}
    for p in model.parameters():
        if p.requires_grad:
            groups["matrices" if p.dim() >= 2 else "gains and biases"].append(p)
    decay = {"matrices": weight_decay, "gains and biases": 0.0}
    return [
        {"params": params, "weight_decay": decay[name], "name": name}
        for name, params in groups.items()
    ]


def make_optimizer(model, config):
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )


def learning_rate(config, step):
    """Of update `step`, counted from 0: linear warm-up, then constant."""
    return config.lr * min(1.0, (step + 1) / max(config.warmup, 1))


class Average:
    """An exponential moving average of a model's parameters, in float32; decay 0: none is kept."""

    def __init__(self, model, decay):
        self.decay = decay
        self._live = dict(model.named_parameters())
        start = {name: p.detach().float().clone() for name, p in self._live.items()}
        self.tensors = start if decay else {}

    @torch.no_grad()
    def restart(self):
        """Begin from the model's weights as they are now."""
        for name, average in self.tensors.items():
            average.copy_(self._live[name])

    @torch.no_grad()
    def update(self):
        if self.decay:
            live = [p.float() for p in self._live.values()]
            torch._foreach_lerp_(list(self.tensors.values()), live, 1 - self.decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self):
        """Within the block the model has the averaged weights, and after it its own, whatever."""
        own = {name: self._live[name].clone() for name in self.tensors}
        try:
            for name, average in self.tensors.items():
                self._live[name].copy_(average)
            yield
        finally:
            for name, p in own.items():
                self._live[name].copy_(p)
