"""Taps on the blocks of a model, and the recorder of what they measure.

A tap is the identity with a backward that measures the tensors that pass through it. It therefore
measures each sample once even if the block is recomputed, measures nothing when the model only
samples, and does not change a bit of a gradient. model.stability.metrics defines the metrics.
"""

import collections
import math
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from model.nn.dit import Block, DiT
from model.stability import metrics
from model.stability.signals import MetricsRow, writer_totals

Segments: TypeAlias = tuple[int, ...]
Key: TypeAlias = tuple[str] | tuple[str, str | int]  # (name,), (metric, layer), ("quarters", i)

MAPS_EVERY = 5  # least steps between two measurements of attention's maps, half of the total cost
MAP_ELEMENTS = 1 << 24  # of the T x T maps processed at a time
DEEP = 0.75  # of the depth: where the deep blocks begin
ROLES = ("Q", "K", "WO", "W2")


def tapped_layers(depth: int) -> list[int]:
    """Return the layers at a quarter, half and three quarters of the depth, and the last one."""
    return sorted({max(0, depth * k // 4 - (k == 4)) for k in (1, 2, 3, 4)})


def attach(model: DiT) -> dict[int, "Probe"]:
    """Attach a probe to four blocks; return {layer: probe}."""
    probes = {}
    for layer in tapped_layers(len(model.blocks)):
        block = cast(Block, model.blocks[layer])
        block.probe = probes[layer] = Probe(block)
    return probes


class Probe:
    """Sums of one block over the micro-batches of a step, on the device until `take`."""

    def __init__(self, block: Block) -> None:
        self.maps = True  # whether to measure attention's maps in this step
        self._merges = block.merges
        self._projections = {"Q": block.operator.q_proj, "K": block.operator.k_proj}
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, metrics.Sums] = {}
        self._gradients: dict[str, tuple[Tensor, Tensor]] = {}

    # The taps, which a block calls. Each returns its first tensor.

    @torch.compiler.disable
    def attention(self, q: Tensor, k: Tensor, x: Tensor, segments: Segments) -> Tensor:
        """Tap q, with k (both (B, T, H, Dh), normalised and rotated) and the trunk x (B, T, D)."""
        if not self.maps:
            return q

        def on_gradient(d: Tensor, q: Tensor, k: Tensor, x: Tensor) -> None:
            B, T, H, _ = q.shape
            samples = max(1, MAP_ELEMENTS // (H * T * T))
            parts = zip(q.split(samples), k.split(samples), x.split(samples), strict=True)
            for q, k, x in parts:
                self._add("attention map", metrics.attention_sums(q, k, x, segments))

        return _tap(q, on_gradient, q, k, x)

    @torch.compiler.disable
    def writer(self, f: Tensor, name: str, h: Tensor, x: Tensor, segments: Segments) -> Tensor:
        """Tap f (B, T, D), which the writer `name` computed from h (B T, Din), and trunk x."""

        def on_gradient(d: Tensor, f: Tensor, h: Tensor, x: Tensor) -> None:
            h = h.view(*x.shape[:2], -1)
            self._add(name, metrics.writer_sums(h, d, segments))
            self._add(name, metrics.merge_sums(self._merges[name], x, f, segments))
            G_mean, G_ctr = metrics.writer_gradient(h, d, segments)
            if name in self._gradients:
                mean_before, ctr_before = self._gradients[name]
                G_mean, G_ctr = mean_before + G_mean, ctr_before + G_ctr
            self._gradients[name] = G_mean, G_ctr

        return _tap(f, on_gradient, f, h, x)

    @torch.compiler.disable
    def trunk(self, y: Tensor, segments: Segments) -> Tensor:
        """Tap y (B, T, D), the result of the block."""

        def on_gradient(d: Tensor, y: Tensor) -> None:
            self._add("trunk", metrics.trunk_sums(y, segments))

        return _tap(y, on_gradient, y)

    def _add(self, part: str, sums: metrics.Sums) -> None:
        table = self._sums.setdefault(part, {})
        for name, value in sums.items():
            table[name] = table[name] + value if name in table else value

    @torch.no_grad()
    def take(self) -> dict[str, Tensor]:
        """Return {metric: 0-d tensor} since the last call; gradients must be in place."""
        row: dict[str, Tensor] = {}
        if "trunk" in self._sums:
            row |= metrics.trunk_metrics(self._sums["trunk"])
            samples = self._sums["trunk"]["samples"]
        if "attention map" in self._sums:
            row |= metrics.attention_metrics(self._sums["attention map"])
        for name in self._gradients:
            parts = metrics.writer_metrics(self._sums[name], samples)
            parts["G_mean"], parts["G_ctr"] = (G.norm() for G in self._gradients[name])
            parts |= metrics.gain_statistics(self._merges[name])
            row |= {f"{metric}_{name}": value for metric, value in parts.items()}
        for role, projection in self._projections.items():
            gradient = projection.weight.grad
            assert gradient is not None
            row[f"grad_{role}"] = gradient.norm()
        self.reset()
        return row


def _tap(t: Tensor, on_gradient: Callable[..., None], *tensors: Tensor) -> Tensor:
    """Return t; when its gradient d arrives, on_gradient(d, *tensors) is called."""
    if not (torch.is_grad_enabled() and t.requires_grad):
        return t  # the model samples, e.g. between two steps
    return _Tap.apply(t, on_gradient, *(tensor.detach() for tensor in tensors))


class _Tap(torch.autograd.Function):
    """The identity, forward and backward."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, on_gradient: Callable[..., None], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)  # so that activation checkpointing can recompute them
        ctx.on_gradient = on_gradient
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # read only once: a recomputed block supplies them once
        with torch.no_grad():
            ctx.on_gradient(d, *tensors)
        return d, None, *(None for _ in tensors)


class Recorder:
    """Metrics of each step, kept on the device and copied to the host together.

    history   the last MOST_ROWS rows that were copied
    """

    MOST_ROWS = 300

    def __init__(
        self,
        model: DiT,
        optimizer: torch.optim.Optimizer,
        probes: bool = True,
        log_every: int = 1,
    ) -> None:
        self._probes = attach(model) if probes else {}
        self._roles = _parameters_by_role(model, optimizer) if probes else {}
        self._maps_every = log_every * math.ceil(MAPS_EVERY / log_every)  # only in written steps
        self._waiting: collections.deque[tuple[int, list[Key], Tensor]] = collections.deque(
            maxlen=self.MOST_ROWS
        )
        self.history: collections.deque[MetricsRow] = collections.deque(maxlen=self.MOST_ROWS)

    def begin(self, step: int) -> None:
        """Prepare the probes; call it before the gradients of a step are computed."""
        for probe in self._probes.values():
            probe.maps = step % self._maps_every == 0

    @torch.no_grad()
    def record(self, step: int, loss: Tensor, norms: Tensor, quarters: Tensor) -> None:
        """Record a step after its backward, without waiting for the device.

        norms     gradient norms of the optimizer's parameters (step.gradient_norms)
        quarters  sums and counts of losses by quarter of t, (2, 4)
        """
        row: dict[Key, Tensor] = {("loss",): loss, ("grad_norm",): norms.norm()}
        row |= {("quarters", i): value for i, value in enumerate(quarters.flatten())}
        row |= {(name,): norms[indices].norm() for name, indices in self._roles.items()}
        for layer, probe in self._probes.items():
            row |= {(metric, str(layer)): value for metric, value in probe.take().items()}
        dtype = torch.promote_types(loss.dtype, torch.float32)
        vector = torch.stack([value.to(dtype) for value in row.values()])
        self._waiting.append((step, list(row), vector))

    def rows(self) -> list[MetricsRow]:
        """Return the rows recorded since the last call, with one copy from the device."""
        if not self._waiting:
            return []
        numbers = torch.cat([vector for _, _, vector in self._waiting]).tolist()
        values = iter(float(f"{value:.9g}") for value in numbers)  # the precision of float32
        rows = [
            _metrics_row(step, {key: next(values) for key in keys})
            for step, keys, _ in self._waiting
        ]
        self._waiting.clear()
        self.history.extend(rows)
        return rows


def _metrics_row(step: int, values: dict[Key, float]) -> MetricsRow:
    """Return a line of metrics.jsonl with values by (name,), (metric, layer), ("quarters", i)."""
    quarters = [value for key, value in values.items() if key[0] == "quarters"]
    n = len(quarters) // 2
    row: MetricsRow = {
        "step": step,
        **{name: value for (name, *layer), value in values.items() if not layer},
        "loss_by_t": [
            s / c if c else None for s, c in zip(quarters[:n], quarters[n:], strict=True)
        ],
        "layerwise": {},
    }
    for (metric, *layer), value in values.items():
        if layer and metric != "quarters":
            row["layerwise"].setdefault(metric, {})[layer[0]] = value
    return row | writer_totals(row["layerwise"])


def _parameters_by_role(model: DiT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return {global_ROLE, deep_ROLE: indices of its weights among the optimizer's parameters}."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    index = {id(p): i for i, p in enumerate(parameters)}
    first_deep = DEEP * (len(model.blocks) - 1)
    table: dict[str, list[int]] = {
        f"{part}_{role}": [] for role in ROLES for part in ("global", "deep")
    }
    for layer, block in enumerate(cast(list[Block], model.blocks)):
        operator = block.operator
        modules = operator.q_proj, operator.k_proj, operator.proj, block.ffn.w2
        for role, module in zip(ROLES, modules, strict=True):
            table[f"global_{role}"].append(index[id(module.weight)])
            if layer >= first_deep:
                table[f"deep_{role}"].append(index[id(module.weight)])
    device = next(model.parameters()).device
    return {name: torch.tensor(indices, device=device) for name, indices in table.items()}
