"""One optimizer step: its batch, gradients and update.

Random numbers are a function of (seed, step, sample). A resumed run, or one whose batch is split
differently, therefore sees the same data, noise, times and dropped captions.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model import rng
from model.config import Config, UsageError
from model.data import Dataset
from model.nn import flow
from model.nn.dit import DiT
from model.nn.precision import autocast
from model.train import heap
from model.train.optim import learning_rate

QUARTERS = 4  # of the range of t; the loss is recorded for each


@dataclass
class Batch:
    """Samples of one step, on the CPU: data, noise, times and text."""

    x0: Tensor
    x1: Tensor
    t: Tensor
    text: Tensor

    def micro_batches(self, size: int, device: str) -> Iterator["Batch"]:
        for i in range(0, len(self.x0), size):
            part = (getattr(self, f.name)[i : i + size] for f in dataclasses.fields(self))
            yield Batch(*(t.to(device, non_blocking=True) for t in part))


def draw_batch(config: Config, dataset: Dataset, step: int) -> Batch:
    """Return the batch of update `step`, counted from 0."""
    numbers = range(step * config.batch, (step + 1) * config.batch)
    indices = [dataset.index(n) for n in numbers]
    images, texts = zip(*(dataset.get(i) for i in indices), strict=True)
    x0 = torch.stack(images)
    for index, *sample in zip(indices, images, texts, strict=True):
        if not all(torch.isfinite(t).all() for t in sample):
            raise UsageError(
                f"sample {index} of the data ({dataset.fingerprint}) or its caption contains NaN "
                f"or infinity; training stopped before step {step + 1}. Fix the sample and resume"
            )
    dropped = rng.uniform(config.seed, "drop", step, numbers) < config.caption_drop
    text = torch.stack([dataset.empty if d else t for t, d in zip(texts, dropped, strict=True)])
    t = flow.times(rng.uniform(config.seed, "time", step, numbers), config.time, config.time_shift)
    x1 = rng.normal(config.seed, "noise", step, numbers, x0.shape[1:])
    return Batch(x0, x1, t.float(), text)


def compute_gradients(
    config: Config, model: DiT, batch: Batch, device: str
) -> tuple[Tensor, Tensor]:
    """Add the gradients of the mean loss of a batch to the parameters, one micro-batch at a time.

    Returns the loss (0-d), and the sums and counts of losses by quarter of t (2, QUARTERS), both on
    the device.
    """
    loss = quarters = torch.zeros((), device=device)
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


def gradient_norms(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the gradient norm of each parameter (n,), in the order of the optimizer's groups.

    The norm is 0 for a parameter without gradient.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    zero = next(g for g in grads if g is not None).new_zeros(())
    places: dict[torch.dtype, list[int]] = {}  # foreach is fast only for tensors of one dtype
    for i, grad in enumerate(grads):
        places.setdefault(zero.dtype if grad is None else grad.dtype, []).append(i)
    norms = [zero] * len(grads)
    for indices in places.values():
        tensors = [grads[i] for i in indices]
        results = torch._foreach_norm([zero if grad is None else grad for grad in tensors])
        for i, norm in zip(indices, results, strict=True):
            norms[i] = norm
    return torch.stack(norms)


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the norm of all gradients, 0-d.

    The parameters are those of the optimizer: model.parameters() walks all modules and takes 10 ms.
    """
    return torch.linalg.vector_norm(gradient_norms(optimizer))


def update(config: Config, step: int, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Clip the gradients, take update `step` with its learning rate, and clear the gradients."""
    if config.clip:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with_gradient = [p for p in parameters if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(with_gradient, config.clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def prepare(config: Config) -> str:
    """Set the threads and the heap of this process; return the device."""
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if torch.device(device).type == "cpu" and config.checkpointing != "none":
        heap.return_freed_memory()  # recomputation trades time for memory, and so does this
    return device


def choose_device(name: str) -> str:
    """Return a device that can be used on this machine; "auto" is cuda if available."""
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
