"""What the token mean does, measured inside a training step and without changing it.

For a writer f = W h (W_O or W_2) and d the gradient of f, the gradient of W splits exactly:

    G = G_mean + G_ctr,   G_mean = sum over samples and segments of Ts (J d)(J h)^T

so two token means and G itself are enough. Of the trunk x after a block, on the image's tokens:

    TCS  mean over samples of the mean cosine of two different tokens
    rho  mean of |J x| over mean of |P x|, Frobenius norms of a sample

Names are the paper's (arXiv 2605.06169). Nothing here draws a random number. |G_ctr| is that of
G - G_mean, so in float32 a ratio of 1e6 or more says that nothing centred is left, not how little.
"""

import torch

from mvsplit_ops.reference import segment_means

WRITERS = ("attention", "ffn")
METRICS = ("tcs", "rho", *(f"{g}_{name}" for name in WRITERS for g in ("G_mean", "G_ctr")))


def tapped_layers(depth):
    """A quarter, half and three quarters of the way, and the last block."""
    return sorted({max(0, depth * k // 4 - (k == 4)) for k in (1, 2, 3, 4)})


def attach(model):
    """Put a probe on four blocks of a DiT; returns {layer: probe}."""
    probes = {layer: Probe(model.blocks[layer]) for layer in tapped_layers(len(model.blocks))}
    for layer, probe in probes.items():
        model.blocks[layer].probe = probe
    return probes


def read(probes):
    """{metric: {layer: value}} of the step whose gradients are in place; starts the next step."""
    rows = {layer: probe.take() for layer, probe in probes.items()}
    if not rows:
        return {}
    values = torch.stack([value for row in rows.values() for value in row.values()]).tolist()
    values = iter(values)
    table = {metric: {} for metric in METRICS}
    for layer, row in rows.items():
        for metric in row:
            table[metric][str(layer)] = next(values)
    return table


def cosine_similarity_sum(x):
    """Sum over the batch of TCS of x (B, T, D): (|sum of unit tokens|^2 - T) / T(T-1), O(T D)."""
    T = x.shape[1]
    unit = torch.nn.functional.normalize(x, dim=-1, eps=1e-12)
    return ((unit.sum(1).square().sum(-1) - T) / (T * (T - 1))).sum()


class Probe:
    """Sums of one block over the micro-batches of a step; on the device until `take`."""

    def __init__(self, block):
        self._writers = block.writers
        self.reset()

    def reset(self):
        self._trunk = 0
        self._mean_gradient = {}

    def trunk(self, x, segments):
        """x (B, T, D), the block's result. A recomputed block comes here twice: ratios stand."""
        if torch.is_grad_enabled():  # not a sample drawn between steps
            self._add(x, segments)

    @torch.no_grad()
    def _add(self, x, segments):
        x = x[:, : segments[0]].detach().float()
        mean = x.mean(1)
        J = mean.norm(dim=-1) * x.shape[1] ** 0.5
        P = (x - mean[:, None]).flatten(1).norm(dim=-1)
        count = torch.full_like(J[0], len(x))
        self._trunk += torch.stack([cosine_similarity_sum(x), J.sum(), P.sum(), count])

    def writer(self, name, h, f, segments):
        """f itself; its gradient, when it comes, is noted with what the writer read, h."""
        if not torch.is_grad_enabled():
            return f

        def note(means, d):
            weights = torch.tensor(segments, device=d.device)[:, None]
            d = (segment_means(d, segments) * weights).flatten(0, 1)
            G = d.t() @ means.flatten(0, 1)
            before = self._mean_gradient.get(name)
            self._mean_gradient[name] = G if before is None else before + G

        return _Note.apply(f, segment_means(h.detach(), segments), note)

    @torch.no_grad()
    def take(self):
        """{metric: 0-d tensor} since the last call; G from the writers' gradients as they are."""
        tcs, J, P, count = self._trunk.unbind()
        row = {"tcs": tcs / count, "rho": J / P}
        for name, G_mean in self._mean_gradient.items():
            row[f"G_mean_{name}"] = G_mean.norm()
            row[f"G_ctr_{name}"] = (self._writers[name].weight.grad.float() - G_mean).norm()
        self.reset()
        return row


class _Note(torch.autograd.Function):
    """The identity; backward also hands its gradient to `note`."""

    @staticmethod
    def forward(ctx, f, means, note):
        ctx.save_for_backward(means)  # so that recomputation in backward can bring it again
        ctx.note = note
        return f.view_as(f)

    @staticmethod
    def backward(ctx, d):
        ctx.note(*ctx.saved_tensors, d)
        return d, None, None
