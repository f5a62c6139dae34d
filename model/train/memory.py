"""Predicted cost of a step, without allocating it: parameters, FLOPs, bytes, kernel calls.

A step of the real model and loss runs on fake tensors (shapes without storage) at two small depths.
Every quantity is linear in the depth, so two depths determine the cost at the full depth.
"""

import collections
import dataclasses
import functools
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import Config, recomputed_blocks
from model.data import Dataset, open_dataset
from model.nn.dit import DiT, build
from model.nn.precision import in_precision
from model.train.optim import make_optimizer
from model.train.step import Batch, compute_gradients, draw_batch, gradient_norm, prepare, update

POLICIES = ("none", "3/4", "full", "selective")
MOMENT_COUNT = 2  # of AdamW, per parameter

# Objects of Python and autograd in host memory, without tensors. Measured with blocks of width 16,
# whose tensors are small, at 400 and 1000 blocks with every policy: 110 to 125 kB per block.
OBJECTS_PER_BLOCK = 115_000


@dataclass(frozen=True)
class Plan:
    """Cost of one optimizer step on one device, in bytes unless noted otherwise."""

    parameters: int  # count
    weights: int  # parameters and buffers
    gradients: int
    moments: int
    average: int
    activations: int  # kept by forward for backward
    working: int  # maximum beyond weights, gradients, moments and activations
    micro_batches: int  # count; with more than one, gradients and activations coexist
    flops: int  # count, of matrix products and attention, including recomputation
    calls: dict[str, int]  # count, of the forward and backward kernels of mvsplit_ops by name
    objects: int  # of Python and autograd, in host memory

    def peak(self, shards: int = 1, host: bool = False) -> int:
        """Return the peak of a step after the first, which allocates the moments.

        shards   devices over which the states are sharded, with one micro-batch on each
        host     whether the tensors are in host memory, so that Python's objects count too
        """
        state = (self.weights + self.moments + self.average) // shards
        gradients = self.gradients // shards
        if self.micro_batches > 1:
            varying = self.activations + gradients
        else:  # backward frees activations while it allocates gradients
            varying = max(self.activations, gradients)
        return state + varying + self.working + (self.objects if host else 0)


@functools.lru_cache
def plan(config: Config) -> Plan:
    """Return the predicted cost of a step."""
    period = 2 if "/" not in config.checkpointing else int(config.checkpointing.split("/")[1])
    near, far = (_trace(dataclasses.replace(config, depth=depth)) for depth in (period, 2 * period))

    def at_depth(one: int, two: int) -> int:
        return one + (two - one) * (config.depth - period) // period

    with torch.device("meta"):
        model = build(config, "meta")
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return Plan(
        parameters=sum(p.numel() for p in parameters),
        weights=sum(t.nbytes for t in (*parameters, *model.buffers())),
        gradients=sum(p.nbytes for p in trained),
        moments=MOMENT_COUNT * sum(p.nbytes for p in trained),
        average=4 * sum(p.numel() for p in parameters) if config.ema else 0,
        activations=at_depth(near.activations, far.activations),
        working=far.working,
        micro_batches=-(-config.batch // (config.micro_batch or config.batch)),
        flops=at_depth(near.flops, far.flops) * config.batch // near.samples,
        calls=_extrapolate_calls(config, near.calls, period),
        objects=OBJECTS_PER_BLOCK * config.depth,
    )


def measure(config: Config, steps: int = 2) -> tuple[int, float]:
    """Return the peak bytes of some steps in this process, and the seconds of the last step.

    On the CPU this is the growth of the process, which must therefore be new; on a GPU it is the
    memory that PyTorch allocated.
    """
    device = prepare(config)
    dataset = open_dataset(config)
    one_block = dataclasses.replace(config, depth=1)
    _take_steps(one_block, dataset, device, 1)  # libraries allocate their buffers
    if torch.device(device).type == "cpu":
        before = _resident_bytes("VmRSS")
        seconds = _take_steps(config, dataset, device, steps)
        return _resident_bytes("VmHWM") - before, seconds
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = _take_steps(config, dataset, device, steps)
    return torch.cuda.max_memory_allocated() - before, seconds


def _take_steps(config: Config, dataset: Dataset, device: str, steps: int) -> float:
    """Train a new model for some steps; return the seconds of the last one."""
    model = build(config, device)
    optimizer = make_optimizer(model, config)
    for step in range(steps):
        batch = draw_batch(config, dataset, step)
        start = time.perf_counter()
        compute_gradients(config, model, batch, device)
        norm = gradient_norm(optimizer)
        update(config, step, optimizer, norm)
        float(norm)  # waits for a GPU
        seconds = time.perf_counter() - start
    return seconds


def _resident_bytes(key: str) -> int:
    """Return the resident bytes now (VmRSS) or at the peak (VmHWM).

    The peak of getrusage would include that of the parent process.
    """
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def _extrapolate_calls(config: Config, counts: Mapping[str, int], depth: int) -> dict[str, int]:
    """Return the calls of a micro-batch at config.depth, from the counts at a small depth.

    Forward kernels run once per block and once more per recomputed block.
    """
    backward = [depth, config.depth]
    forward = [d + sum(recomputed_blocks(config.checkpointing, d)) for d in backward]
    calls = {}
    for name, n in counts.items():
        small, full = backward if name.endswith("_bwd") else forward
        calls[name] = n * full // small
    return calls


@dataclass(frozen=True)
class _Trace:
    """Cost of one micro-batch at a small depth, with the fields of Plan."""

    activations: int
    working: int
    flops: int
    calls: Mapping[str, int]
    samples: int


def _trace(config: Config) -> _Trace:
    """Run one micro-batch on fake tensors."""
    size = min(config.micro_batch or config.batch, config.batch)
    config = dataclasses.replace(config, batch=size, micro_batch=0)
    with FakeTensorMode():
        model = in_precision(DiT(config), config)
        image = (size, config.channels, config.size, config.size)
        text = torch.empty(size, config.text_tokens, config.text_dim)
        batch = Batch(torch.empty(image), torch.empty(image), torch.rand(size), text)
        live, work = LiveBytes(), _WorkCounter()
        after_forward: list[int] = []
        model.final_proj.register_forward_hook(lambda *unused: after_forward.append(live.bytes))
        with live, work:
            compute_gradients(config, model, batch, "cpu")
    activations = after_forward[0]
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return _Trace(activations, live.peak - max(activations, trained), work.flops, work.calls, size)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages created within the block that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._counted: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        inputs = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for t in _tensors(out):
            storage = t.untyped_storage()
            if id(storage) not in inputs and storage not in self._counted:
                self._counted.add(storage)
                weakref.finalize(storage, self._on_free, storage.nbytes())
                self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        return out

    def _on_free(self, n: int) -> None:
        self.bytes -= n


class _WorkCounter(TorchDispatchMode):
    """FLOPs of matrix products, convolutions and attention; kernel calls of mvsplit_ops by name.

    PyTorch's FlopCounterMode also tracks modules, which keeps their tensors alive.
    """

    def __init__(self) -> None:
        super().__init__()
        # Imports Triton, which must not happen before its interpreter can be chosen.
        from torch.utils.flop_counter import flop_registry

        self.flops = 0
        self.calls: collections.Counter[str] = collections.Counter()
        self._formulas = flop_registry

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        packet = _CPU_ATTENTION.get(packet, packet)
        if packet in self._formulas:
            self.flops += self._formulas[packet](*args, **(kwargs or {}), out_val=out)
        elif function.namespace == "mvsplit":
            self.calls[packet.__name__] += 1
        return out


# Attention on the CPU has the same FLOPs as on a GPU.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        torch.ops.aten._scaled_dot_product_flash_attention
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
