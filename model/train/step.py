"""One optimizer step: what it is drawn from, its gradients, its update.

What is random is a function of (seed, step, sample), so a run that is resumed, or whose batch is
split otherwise, sees the same data, noise, times and dropped captions.
"""

import dataclasses
from dataclasses import dataclass

import torch

from model import rng
from model.config import UsageError
from model.nn import flow
from model.nn.precision import autocast
from model.train import heap
from model.train.optim import learning_rate

QUARTERS = 4  # of t, for which the loss is logged apart


@dataclass
class Batch:
    """Samples of one step, on the CPU: data, noise, times and text."""

    x0: torch.Tensor
    x1: torch.Tensor
    t: torch.Tensor
    text: torch.Tensor

    def micro_batches(self, size, device):
        for i in range(0, len(self.x0), size):
            part = (getattr(self, f.name)[i : i + size] for f in dataclasses.fields(self))
            yield Batch(*(t.to(device, non_blocking=True) for t in part))


def draw_batch(config, dataset, step):
    """The batch of update `step`, counted from 0."""
    numbers = range(step * config.batch, (step + 1) * config.batch)
    indices = [dataset.index(n) for n in numbers]
    images, texts = zip(*(dataset.get(i) for i in indices), strict=True)
    x0 = torch.stack(images)
    for index, *sample in zip(indices, images, texts, strict=True):
        if not all(torch.isfinite(t).all() for t in sample):
            raise UsageError(
                f"sample {index} of the data ({dataset.fingerprint}) or its caption holds a value "
                f"that is not finite; step {step + 1} was not taken: mend the sample and resume"
            )
    dropped = rng.uniform(config.seed, "drop", step, numbers) < config.caption_drop
    text = torch.stack([dataset.empty if d else t for t, d in zip(texts, dropped, strict=True)])
    t = flow.times(rng.uniform(config.seed, "time", step, numbers), config.time, config.time_shift)
    x1 = rng.normal(config.seed, "noise", step, numbers, x0.shape[1:])
    return Batch(x0, x1, t.float(), text)


def gradients(config, model, batch, device):
    """Gradients of the mean loss of a batch, micro-batch by micro-batch.

    Returns the loss (0-d), and the losses' sums and counts by quarter of t (2, QUARTERS), on the
    device.
    """
    loss, quarters = 0, 0
    for part in batch.micro_batches(config.micro_batch or config.batch, device):
        z = flow.interpolate(part.x0, part.x1, part.t)
        if config.precision == "bf16":
            z, part.text = z.bfloat16(), part.text.bfloat16()
        with autocast(config, device):
            v = model(z, part.text)
        losses = flow.loss_per_sample(v, part.x0, part.x1)
        (losses.sum() / config.batch).backward()
        losses = losses.detach()
        loss = loss + losses.sum() / config.batch
        quarter = (part.t * QUARTERS).long().clamp(max=QUARTERS - 1)  # t may round to 1
        member = torch.nn.functional.one_hot(quarter, QUARTERS).to(losses)
        quarters = quarters + torch.stack([losses @ member, member.sum(0)])
    return loss, quarters


def gradient_norms(optimizer):
    """Of each parameter of an optimizer, (n,), in the order of its groups; 0 without a gradient."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    none = next(g for g in grads if g is not None).new_zeros(())
    places = {}  # by dtype: of mixed ones foreach takes one after another
    for i, grad in enumerate(grads):
        places.setdefault(none.dtype if grad is None else grad.dtype, []).append(i)
    norms = [none] * len(grads)
    for of in places.values():
        found = torch._foreach_norm([none if grads[i] is None else grads[i] for i in of])
        for i, norm in zip(of, found, strict=True):
            norms[i] = norm
    return torch.stack(norms)


def gradient_norm(optimizer):
    """Of all gradients together, 0-d. model.parameters() would walk through every module: 10 ms."""
    return torch.linalg.vector_norm(gradient_norms(optimizer))


def update(config, step, optimizer, norm):
    """Clip, set the learning rate of update `step` and take it; gradients are gone after it."""
    if config.clip:
        torch.nn.utils.clip_grads_with_norm_(_trained(optimizer), config.clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _trained(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def prepare(config):
    """Set up the process for a configuration; returns the device."""
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if torch.device(device).type == "cpu" and config.checkpointing != "none":
        heap.return_freed_memory()  # who recomputes wants memory more than time
    return device


def choose_device(name):
    """A torch device that can be used here; UsageError when it cannot."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]}; "
            "pass --set device=cpu"
        ) from error
    return name
