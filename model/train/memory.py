"""What a step will cost, before anything is allocated: parameters, FLOPs, bytes, calls.

A step of the real model and the real loss runs on fake tensors (shapes without storage) at two
small depths; every quantity is linear in the depth, so two depths tell the full one.
"""

import collections
import dataclasses
import functools
import time
import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import recomputed_blocks
from model.data import open_dataset
from model.nn.dit import DiT, build
from model.nn.precision import in_precision
from model.train.optim import make_optimizer
from model.train.step import Batch, draw_batch, gradient_norm, gradients, prepare, update

POLICIES = ("none", "3/4", "full", "selective")
MOMENTS = 2  # AdamW's

# Objects of Python and autograd, in host memory, that are no tensor's: measured with blocks of
# width 16, whose tensors are small. 400 and 1000 blocks, every policy: 110 to 125 kB a block.
OBJECTS_PER_BLOCK = 115_000


@dataclass(frozen=True)
class Plan:
    """One optimizer step of a configuration on one device; bytes unless said otherwise."""

    parameters: int  # count
    weights: int  # parameters and buffers
    gradients: int
    moments: int
    average: int
    activations: int  # what forward keeps for backward
    working: int  # beyond these, at the worst moment
    micro_batches: int  # of a step; with more than one, gradients wait beside activations
    flops: int  # of matrix products and attention, recomputation included
    calls: dict  # forward and backward kernels of mvsplit_ops, by name

    objects: int  # in host memory, beside the tensors

    def peak(self, shards=1, host=False):
        """Of a step but the first, states sharded over `shards` devices, a micro-batch on each.

        host: the tensors are in host memory, so what Python keeps there counts too.
        """
        state = (self.weights + self.moments + self.average) // shards
        gradients = self.gradients // shards
        if self.micro_batches > 1:
            moving = self.activations + gradients
        else:  # forward and backward hand memory from one to the other
            moving = max(self.activations, gradients)
        return state + moving + self.working + (self.objects if host else 0)


@functools.lru_cache
def plan(config):
    """The Plan of a configuration."""
    period = 2 if "/" not in config.checkpointing else int(config.checkpointing.split("/")[1])
    near, far = (_trace(dataclasses.replace(config, depth=depth)) for depth in (period, 2 * period))

    def at_depth(one, two):
        return one + (two - one) * (config.depth - period) // period

    with torch.device("meta"):
        model = build(config, "meta")
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    calls = _calls(config, near["calls"], period)
    return Plan(
        parameters=sum(p.numel() for p in parameters),
        weights=sum(t.nbytes for t in (*parameters, *model.buffers())),
        gradients=sum(p.nbytes for p in trained),
        moments=MOMENTS * sum(p.nbytes for p in trained),
        average=4 * sum(p.numel() for p in parameters) if config.ema else 0,
        activations=at_depth(near["activations"], far["activations"]),
        working=far["working"],
        micro_batches=-(-config.batch // (config.micro_batch or config.batch)),
        flops=at_depth(near["flops"], far["flops"]) * config.batch // near["samples"],
        calls=calls,
        objects=OBJECTS_PER_BLOCK * config.depth,
    )


def measure(config, steps=2):
    """Peak bytes that steps of a configuration take in this process, and seconds of the last one.

    On the CPU what the process grew by, so call it in a fresh one; on a GPU what PyTorch took.
    """
    device = prepare(config)
    dataset = open_dataset(config)
    _steps(dataclasses.replace(config, depth=1), dataset, device, 1)  # libraries make their buffers
    if torch.device(device).type == "cpu":
        before = _resident("VmRSS")
        seconds = _steps(config, dataset, device, steps)
        return _resident("VmHWM") - before, seconds
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = _steps(config, dataset, device, steps)
    return torch.cuda.max_memory_allocated() - before, seconds


def _steps(config, dataset, device, steps):
    model = build(config, device)
    optimizer = make_optimizer(model, config)
    for step in range(steps):
        batch = draw_batch(config, dataset, step)
        start = time.perf_counter()
        gradients(config, model, batch, device)
        norm = gradient_norm(optimizer)
        update(config, step, optimizer, norm)
        float(norm)  # waits for a GPU
        seconds = time.perf_counter() - start
    return seconds


def _resident(which):
    """Resident bytes, now (VmRSS) or at most (VmHWM), without the parent that getrusage counts."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(which))
    return int(line.split()[1]) * 1024


def _calls(config, counted, depth):
    """Calls of a micro-batch: counted at `depth`, by forward and recomputed blocks at the full."""
    again = [sum(recomputed_blocks(config.checkpointing, d)) for d in (depth, config.depth)]
    forward = [d + r for d, r in zip((depth, config.depth), again, strict=True)]
    backward = [depth, config.depth]
    calls = {}
    for name, n in counted.items():
        small, full = backward if name.endswith("_bwd") else forward
        calls[name] = n * full // small
    return calls


def _trace(config):
    """Activations, working bytes, FLOPs and calls of one micro-batch at a small depth."""
    size = min(config.micro_batch or config.batch, config.batch)
    config = dataclasses.replace(config, batch=size, micro_batch=0)
    with FakeTensorMode():
        model = in_precision(DiT(config), config)
        image = (size, config.channels, config.size, config.size)
        text = torch.empty(size, config.text_tokens, config.text_dim)
        batch = Batch(torch.empty(image), torch.empty(image), torch.rand(size), text)
        live, work = LiveBytes(), _Work()
        kept = []
        model.final_proj.register_forward_hook(lambda *unused: kept.append(live.bytes))
        with live, work:
            gradients(config, model, batch, "cpu")
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {
        "activations": kept[0],
        "working": live.peak - max(kept[0], trained),
        "flops": work.flops,
        "calls": work.calls,
        "samples": size,
    }


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made within the block that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for t in _tensors(out):
            storage = t.untyped_storage()
            if id(storage) not in given and storage not in self._seen:
                self._seen.add(storage)
                weakref.finalize(storage, self._gone, storage.nbytes())
                self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        return out

    def _gone(self, n):
        self.bytes -= n


class _Work(TorchDispatchMode):
    """FLOPs of matrix products, convolutions and attention; calls of mvsplit_ops' kernels by name.

    PyTorch's FlopCounterMode follows modules too, and keeps their tensors alive for it.
    """

    def __init__(self):
        super().__init__()
        # Here, since it imports Triton, and that decides whether its kernels are interpreted.
        from torch.utils.flop_counter import flop_registry

        self.flops, self.calls, self._flops_of = 0, collections.Counter(), flop_registry

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        packet = _CPU_ATTENTION.get(packet, packet)
        if packet in self._flops_of:
            self.flops += self._flops_of[packet](*args, **(kwargs or {}), out_val=out)
        elif function.namespace == "mvsplit":
            self.calls[packet.__name__] += 1
        return out


# The CPU's attention counts as the GPU's.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        torch.ops.aten._scaled_dot_product_flash_attention
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


def _tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
