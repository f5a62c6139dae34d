"""Taps on the blocks of a model, and the buffer on the device that what they measure goes to.

A tap is the identity with a backward that looks at what comes by: it sees each sample once even
where a block is recomputed, nothing of a model that only samples, and it changes no bit of a
gradient. What the metrics are is told in model.diagnostics.
"""

import collections
import math

import torch

from model.stability import metrics
from model.stability.guard import writer_totals

MAPS_EVERY = 5  # steps at least between two looks at attention's T x T maps, half of all the cost
MAP_ELEMENTS = 1 << 24  # of the maps that are worked on at a time
DEEP = 0.75  # of the depth: blocks from there on are the deep ones
ROLES = ("Q", "K", "WO", "W2")


def tapped_layers(depth):
    """A quarter, half and three quarters of the way, and the last block."""
    return sorted({max(0, depth * k // 4 - (k == 4)) for k in (1, 2, 3, 4)})


def attach(model):
    """Put a probe on four blocks of a DiT; returns {layer: probe}."""
    probes = {layer: Probe(model.blocks[layer]) for layer in tapped_layers(len(model.blocks))}
    for layer, probe in probes.items():
        model.blocks[layer].probe = probe
    return probes


class Probe:
    """Sums of one block over the micro-batches of a step, on the device until `take`."""

    def __init__(self, block):
        self.maps = True  # is attention measured in this step?
        self._merges = block.merges
        self._queries_keys = {"Q": block.operator.q_proj, "K": block.operator.k_proj}
        self.reset()

    def reset(self):
        self._sums = {}
        self._gradients = {}

    # The taps, which a block calls: each returns its first tensor.

    @torch.compiler.disable
    def attention(self, q, k, x, segments):
        """q, k (B, T, H, Dh), normalised and rotated, of the trunk x."""
        if not self.maps:
            return q

        def look(d, q, k, x):
            B, T, H, _ = q.shape
            samples = max(1, MAP_ELEMENTS // (H * T * T))
            for part in zip(*(t.split(samples) for t in (q, k, x)), strict=True):
                self._add("attention map", metrics.attention_sums(*part, segments))

        return _tap(q, look, q, k, x)

    @torch.compiler.disable
    def writer(self, f, name, h, x, segments):
        """f (B, T, D), what the writer `name` made of h (B T, Din), about to be merged into x."""

        def look(d, f, h, x):
            h = h.view(*x.shape[:2], -1)
            self._add(name, metrics.writer_sums(h, d, segments))
            self._add(name, metrics.merge_sums(self._merges[name], x, f, segments))
            before = self._gradients.get(name, (0, 0))
            now = metrics.writer_gradient(h, d, segments)
            self._gradients[name] = [a + b for a, b in zip(before, now, strict=True)]

        return _tap(f, look, f, h, x)

    @torch.compiler.disable
    def trunk(self, y, segments):
        """y (B, T, D), the block's result."""

        def look(d, y):
            self._add("trunk", metrics.trunk_sums(y, segments))

        return _tap(y, look, y)

    def _add(self, part, sums):
        table = self._sums.setdefault(part, {})
        for name, value in sums.items():
            table[name] = table[name] + value if name in table else value

    @torch.no_grad()
    def take(self):
        """{metric: 0-d tensor} since the last call, with the gradients as they are."""
        row = {}
        if "trunk" in self._sums:
            row |= metrics.finished_trunk(self._sums["trunk"])
            samples = self._sums["trunk"]["samples"]
        if "attention map" in self._sums:
            row |= metrics.finished_attention(self._sums["attention map"])
        for name in self._gradients:
            parts = metrics.finished_writer(self._sums[name], samples)
            parts["G_mean"], parts["G_ctr"] = (G.norm() for G in self._gradients[name])
            parts |= metrics.gain_statistics(self._merges[name])
            row |= {f"{metric}_{name}": value for metric, value in parts.items()}
        for role, projection in self._queries_keys.items():
            row[f"grad_{role}"] = projection.weight.grad.norm()
        self.reset()
        return row


def _tap(t, look, *seen):
    """t; when its gradient d comes, look(d, *seen) is called."""
    if not (torch.is_grad_enabled() and t.requires_grad):
        return t  # a sample drawn between steps
    return _Tap.apply(t, look, *(s.detach() for s in seen))


class _Tap(torch.autograd.Function):
    """The identity, forward and backward."""

    @staticmethod
    def forward(ctx, t, look, *seen):
        ctx.save_for_backward(*seen)  # so that recomputation in backward can bring them again
        ctx.look = look
        return t.view_as(t)

    @staticmethod
    def backward(ctx, d):
        seen = ctx.saved_tensors  # once: a recomputed block gives them once
        with torch.no_grad():
            ctx.look(d, *seen)
        return d, None, *(None for _ in seen)


class Recorder:
    """What is measured of each step: a row on the device, the last KEPT of them, copied together.

    history   the last KEPT rows that were copied, as dictionaries
    """

    KEPT = 300

    def __init__(self, model, optimizer, probes=True, log_every=1):
        self._probes = attach(model) if probes else {}
        self._roles = _by_role(model, optimizer) if probes else {}
        self._maps_every = log_every * math.ceil(MAPS_EVERY / log_every)  # steps that are written
        self._waiting = collections.deque(maxlen=self.KEPT)
        self.history = collections.deque(maxlen=self.KEPT)

    def begin(self, step):
        """To be called before the gradients of a step are computed."""
        for probe in self._probes.values():
            probe.maps = step % self._maps_every == 0

    @torch.no_grad()
    def record(self, step, loss, norms, quarters):
        """Measure a step whose gradients are in place, `norms` their own; nothing is waited for."""
        row = {("loss",): loss, ("grad_norm",): norms.norm()}
        row |= {("quarters", i): value for i, value in enumerate(quarters.flatten())}
        row |= {(name,): norms[places].norm() for name, places in self._roles.items()}
        for layer, probe in self._probes.items():
            row |= {(metric, str(layer)): value for metric, value in probe.take().items()}
        dtype = torch.promote_types(loss.dtype, torch.float32)
        vector = torch.stack([value.to(dtype) for value in row.values()])
        self._waiting.append((step, list(row), vector))

    def rows(self):
        """The rows since the last call, with one copy from the device."""
        if not self._waiting:
            return []
        values = torch.cat([vector for _, _, vector in self._waiting]).tolist()
        values = iter(float(f"{value:.9g}") for value in values)  # all that float32 holds
        rows = [
            _row(step, {name: next(values) for name in names}) for step, names, _ in self._waiting
        ]
        self._waiting.clear()
        self.history.extend(rows)
        return rows


def _row(step, values):
    """A line of metrics.jsonl of {(name,) or (metric, layer): value}."""
    quarters = [value for key, value in values.items() if key[0] == "quarters"]
    n = len(quarters) // 2
    row = {
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


def _by_role(model, optimizer):
    """{global_ROLE, deep_ROLE: the places of its weights among an optimizer's parameters}."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    place = {id(p): i for i, p in enumerate(parameters)}
    first_deep = DEEP * (len(model.blocks) - 1)
    table = {f"{part}_{role}": [] for role in ROLES for part in ("global", "deep")}
    for layer, block in enumerate(model.blocks):
        operator = block.operator
        modules = operator.q_proj, operator.k_proj, operator.proj, block.ffn.w2
        for role, module in zip(ROLES, modules, strict=True):
            table[f"global_{role}"].append(place[id(module.weight)])
            if layer >= first_deep:
                table[f"deep_{role}"].append(place[id(module.weight)])
    device = next(model.parameters()).device
    return {name: torch.tensor(places, device=device) for name, places in table.items()}
