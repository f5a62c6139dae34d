"""Metrics of the paper's glossary: what the token mean does in a block, exact over all samples.

J averages over the tokens of a segment (image, text), P = I - J. In a block, X is the trunk that it
reads, Y the trunk that it returns, and A its attention probabilities (one matrix per sample and
head). A writer computes f = W h (attention: W_O, ffn: W_2); d is the gradient of f. Norms are
Frobenius norms.

    tcs           mean over samples of the mean cosine of two different tokens of Y
    rho           mean of |J Y| over mean of |P Y|
    contraction   mean of |P A P|_2, the largest singular value
    retention     |P A P X|^2 / |P X|^2            share of centred variation kept, mean over heads
    leakage       |J A P X| / |P X|                centred variation moved into the mean
    row_diversity mean of |P A| / |A|              0: all rows of A are equal
    G_mean        |sum of Ts (J d)(J h)^T|         the gradient of W is exactly the sum of the
    G_ctr         |sum of (P d)^T (P h)|           matrices in G_mean and G_ctr
    A             mean of |d^T h|^2 / sum_t |d_t|^2 |h_t|^2     amplification by alignment
    kappa         mean of (T - 1) mean_{i != j} |cos(h_i, h_j)| |cos(d_i, d_j)|
    kappa_signed  kappa with signed cosines; equals A - 1 when all tokens have the same length
    tr_ratio      |f| / |X|,  var_gain  |P f| / |P X|           X: the trunk that f is merged into
    *_gated       tr_ratio and var_gain of the gated update, e.g. beta P f + alpha J (f - X)
    alpha, beta, scale     mean, minimum and maximum of a gain of the merge
    grad_Q, grad_K         gradient norms of W_Q and W_K

tcs, rho, A, kappa and kappa_signed are per segment: the plain name is the image's, names with _text
are the text's. The metrics of a writer end in _attention or _ffn. All are from the glossary of
arXiv 2605.06169 (where the energy ratio rho is a ratio of norms), except kappa_signed and *_gated,
which this project adds. For retention, leakage and row_diversity the paper gives only names; the
formulas are this project's.

A function `..._sums` returns {name: 0-d sum over samples}. The sums of micro-batches are added, and
`..._metrics` computes the metrics from them. No function draws random numbers. The costs are
O(T D), Gram matrices, and products of attention's T x T maps.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

import mvsplit_ops as mv
from model.nn.residual import Merge

Sums: TypeAlias = dict[str, Tensor]

WRITERS = ("attention", "ffn")
SEGMENT_SUFFIXES = ("", "_text")  # of the image and the text
SQUARINGS = 10  # of spectral_norm: relative error at most log(T) / 2^11, if all values are equal
RESCALE_EVERY = 3  # squarings; between two rescalings the trace falls to T^-8, far from underflow


def upcast(t: Tensor) -> Tensor:
    """Return t, detached, in the dtype of its metrics: float64 if t has it, otherwise float32."""
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))


def expand_means(means: Tensor, segments: Sequence[int]) -> Tensor:
    """Repeat segment means (..., S, D) for the tokens of their segments, (..., T, D)."""
    rows = means.split(1, -2)
    parts = [row.expand(*row.shape[:-2], n, -1) for row, n in zip(rows, segments, strict=True)]
    return torch.cat(parts, -2)


def split_mean(t: Tensor, segments: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return P t (..., T, D) and the segment means (..., S, D) of t (..., T, D)."""
    means = torch.stack([part.mean(-2) for part in t.split(segments, -2)], -2)
    return t - expand_means(means, segments), means


def mean_energy(means: Tensor, segments: Sequence[int]) -> Tensor:
    """Return |J t|^2 (...) from the segment means (..., S, D) of t."""
    rows = means.square().sum(-1).unbind(-1)
    return _sum(n * row for n, row in zip(segments, rows, strict=True))


def trunk_sums(y: Tensor, segments: Sequence[int]) -> Sums:
    """Return the sums for tcs and rho from the trunk y (B, T, D) that a block returns."""
    y = upcast(y)
    sums = {"samples": y.new_full((), len(y))}
    for end, part in zip(SEGMENT_SUFFIXES, y.split(segments, 1), strict=False):
        T, mean = part.shape[1], part.mean(1)
        if T > 1:
            unit = torch.nn.functional.normalize(part, dim=-1, eps=1e-12)
            cosines = (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))) / (T * (T - 1))
            sums[f"tcs{end}"] = cosines.sum()
        sums[f"J{end}"] = T**0.5 * mean.norm(dim=-1).sum()
        sums[f"P{end}"] = (part - mean[:, None]).flatten(1).norm(dim=-1).sum()
    return sums


def attention_sums(q: Tensor, k: Tensor, x: Tensor, segments: Sequence[int]) -> Sums:
    """Return the sums of attention's metrics from q, k (B, T, H, Dh) and the trunk x (B, T, D)."""
    q, k, x = upcast(q).transpose(1, 2), upcast(k).transpose(1, 2), upcast(x)
    A = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, -1)
    PA, _ = split_mean(A, segments)
    PAP = split_mean(PA.transpose(2, 3), segments)[0].transpose(2, 3)
    JA = A - PA
    Px, _ = split_mean(x, segments)
    retained = PAP @ Px[:, None]
    starts = (sum(segments[:i]) for i in range(len(segments)))
    rows = torch.stack([JA[:, :, start] for start in starts], 2)  # equal within a segment
    leaked = rows @ Px[:, None]
    return {
        "maps": A.new_full((), A.shape[0] * A.shape[1]),
        "contraction": spectral_norm(PAP.flatten(0, 1)).sum(),
        "retained": retained.square().sum(),
        "leaked": mean_energy(leaked, segments).sum(),
        "centred": Px.square().sum() * A.shape[1],
        "row_diversity": (PA.flatten(2).norm(dim=-1) / A.flatten(2).norm(dim=-1)).sum(),
    }


def spectral_norm(t: Tensor) -> Tensor:
    """Return the largest singular values (N,) of matrices (N, T, T).

    Computed as tr((t^T t)^n)^(1/2n) with n = 2^SQUARINGS. This needs only matrix products, where a
    solver would loop over the matrices on a GPU and power iteration would need a random start.
    """
    M = t.transpose(1, 2) @ t
    log, tiny = t.new_zeros(len(t)), torch.finfo(t.dtype).tiny
    for i in range(SQUARINGS + 1):
        if i % RESCALE_EVERY == 0 or i == SQUARINGS:
            trace = M.diagonal(dim1=1, dim2=2).sum(1).clamp_min(tiny)
            log = log + trace.log() / 2**i
            M = M / trace[:, None, None]
        if i < SQUARINGS:
            M = M @ M
    return torch.where(t.abs().amax((1, 2)) > tiny**0.5, (log / 2).exp(), 0.0)


def writer_sums(h: Tensor, d: Tensor, segments: Sequence[int]) -> Sums:
    """Return the sums for A and kappa.

    h is the input of a writer (B, T, Din) and d the gradient of its output (B, T, D).
    """
    h, d = upcast(h), upcast(d)
    sums: Sums = {}
    for end, hs, ds in zip(
        SEGMENT_SUFFIXES, h.split(segments, 1), d.split(segments, 1), strict=False
    ):
        T = hs.shape[1]
        if T == 1:
            continue
        greatest = ds.abs().amax((1, 2), keepdim=True)  # d is squared twice: avoid underflow
        ds = ds / greatest.clamp_min(torch.finfo(ds.dtype).tiny)
        H, D = hs @ hs.transpose(1, 2), ds @ ds.transpose(1, 2)
        product = H.mul_(D)  # in place: T x T per sample
        own = product.diagonal(dim1=1, dim2=2).clone()  # |d_t|^2 |h_t|^2
        sums[f"A{end}"] = (product.sum((1, 2)) / own.sum(1)).sum()
        norms = own.sqrt().clamp_min(torch.finfo(own.dtype).tiny)  # 0 / tiny = 0 for a zero token
        cosines = product / norms[:, None] / norms[:, :, None]
        cosines.clamp_(-1, 1)  # larger only where `own` underflows
        cosines.diagonal(dim1=1, dim2=2).zero_()
        sums[f"kappa_signed{end}"] = cosines.sum() / T  # (T - 1) / T(T - 1)
        sums[f"kappa{end}"] = cosines.abs_().sum() / T
    return sums


def writer_gradient(h: Tensor, d: Tensor, segments: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the mean and the centred part of the gradient of a writer's weight, (D, Din) each.

    Their sum is the gradient.
    """
    Ph, h_mean = split_mean(upcast(h), segments)
    Pd, d_mean = split_mean(upcast(d), segments)
    pairs = zip(segments, d_mean.unbind(1), h_mean.unbind(1), strict=True)
    G_mean = _sum(n * d.t() @ h for n, d, h in pairs)
    return G_mean, Pd.flatten(0, 1).t() @ Ph.flatten(0, 1)


def merge_sums(merge: Merge, x: Tensor, f: Tensor, segments: Sequence[int]) -> Sums:
    """Return the sums for tr_ratio and var_gain of a merge of trunk x and branch f (B, T, D)."""
    x, f = upcast(x), upcast(f)
    Px, jx = split_mean(x, segments)
    Pf, jf = split_mean(f, segments)
    gains = {name: upcast(gain) for name, gain in merge_gains(merge).items()}
    if "alpha" in gains:
        Pu, ju = gains["beta"] * Pf, gains["alpha"] * (jf - jx)
    else:
        scale = gains.get("scale", 1.0)
        Pu, ju = scale * Pf, scale * jf
    sums: Sums = {}
    for name, P, j in (("x", Px, jx), ("f", Pf, jf), ("u", Pu, ju)):
        sums[f"P{name}"] = P.square().sum()
        sums[name] = sums[f"P{name}"] + mean_energy(j, segments).sum()
    return sums


def merge_gains(merge: Merge) -> dict[str, Tensor]:
    """Return the gains of a merge by name: alpha and beta, or scale, or none."""
    if isinstance(merge, mv.MVSplitRMSNorm):
        return {"alpha": merge.alpha, "beta": merge.beta}
    return {} if merge.scale is None else {"scale": merge.scale}


def gain_statistics(merge: Merge) -> dict[str, Tensor]:
    """Return the signed mean, minimum and maximum of each gain of a merge."""
    table = {}
    for name, gain in merge_gains(merge).items():
        gain = upcast(gain)
        table[f"{name}_mean"] = gain.mean()
        table[f"{name}_min"], table[f"{name}_max"] = gain.aminmax()
    return table


def trunk_metrics(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tcs and rho from the result of trunk_sums."""
    row = {}
    for end in SEGMENT_SUFFIXES:
        if f"tcs{end}" in sums:
            row[f"tcs{end}"] = sums[f"tcs{end}"] / sums["samples"]
        if f"J{end}" in sums:
            row[f"rho{end}"] = sums[f"J{end}"] / sums[f"P{end}"]
    return row


def attention_metrics(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return attention's metrics from the result of attention_sums."""
    return {
        "contraction": sums["contraction"] / sums["maps"],
        "retention": sums["retained"] / sums["centred"],
        "leakage": (sums["leaked"] / sums["centred"]).sqrt(),
        "row_diversity": sums["row_diversity"] / sums["maps"],
    }


def writer_metrics(sums: Mapping[str, Tensor], samples: Tensor) -> dict[str, Tensor]:
    """Return a writer's metrics from writer_sums and merge_sums over a number of samples."""
    means = [f"{name}{end}" for name in ("A", "kappa", "kappa_signed") for end in SEGMENT_SUFFIXES]
    row = {name: sums[name] / samples for name in means if name in sums}
    for name, update in (("", "f"), ("_gated", "u")):
        row[f"tr_ratio{name}"] = (sums[update] / sums["x"]).sqrt()
        row[f"var_gain{name}"] = (sums[f"P{update}"] / sums["Px"]).sqrt()
    return row


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)
