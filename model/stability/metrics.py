"""The paper's glossary: what the token mean does in a block, as exact sums over all samples.

J averages over the tokens of a segment (image, text), P = I - J. Of a block, X is the trunk it
reads, Y the trunk it returns, A its attention's probabilities (a matrix for each sample and head);
of a writer f = W h (attention: W_O, ffn: W_2), d is the gradient of f. Norms are Frobenius norms.

    tcs           mean over samples of the mean cosine of two different tokens of Y
    rho           mean of |J Y| over mean of |P Y|
    contraction   mean of |P A P|_2, the largest singular value
    retention     |P A P X|^2 / |P X|^2                 of centred variation, mean over heads
    leakage       |J A P X| / |P X|                     of centred variation into the mean
    row_diversity mean of |P A| / |A|                   0: every row of A is the same
    G_mean        |sum of Ts (J d)(J h)^T|              the gradient of W is exactly the sum of
    G_ctr         |sum of (P d)^T (P h)|                these two matrices
    A             mean of |d^T h|^2 / sum_t |d_t|^2 |h_t|^2     amplification by alignment
    kappa         mean of (T - 1) mean_{i != j} |cos(h_i, h_j)| |cos(d_i, d_j)|, and
    kappa_signed  the same with the cosines' signs, which A - 1 is when all tokens are of one length
    tr_ratio      |f| / |X|,  var_gain  |P f| / |P X|   X: what the merge adds f to
    *_gated       the same of what the merge adds in fact, e.g. beta P f + alpha J (f - X)
    alpha, beta, scale     mean, least and greatest of a merge's gain
    grad_Q, grad_K         gradient norms of W_Q and W_K

tcs, rho, A and the kappas are taken within a segment: of the image, and with _text of the text. A
writer's metrics end in _attention or _ffn. All are the glossary's of arXiv 2605.06169, whose energy
ratio rho is one of norms, but for kappa_signed and *_gated, which are ours, and for the formulas of
retention, leakage and row_diversity, which it names alone.

A function here returns {name: 0-d sum} of some samples. Sums of micro-batches add up, and
`finished_...` makes metrics of them. Nothing draws a random number; all is O(T D), Gram matrices,
or products of attention's T x T maps.
"""

import torch

import mvsplit_ops as mv

WRITERS = ("attention", "ffn")
SEGMENTS = ("", "_text")  # what a name ends in; the image's is plain
SQUARINGS = 10  # of spectral_norm: too large by log(T) / 2^11 of itself at most, if all are equal
RESCALED = 3  # squarings between two traces: T^-8 is no small number


def exact(t):
    """t in the dtype its metrics are computed in: float32, or float64 as it is."""
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))


def spread(means, segments):
    """Segment means (..., S, D) over the tokens of their segments, (..., T, D)."""
    rows = means.split(1, -2)
    parts = [row.expand(*row.shape[:-2], n, -1) for row, n in zip(rows, segments, strict=True)]
    return torch.cat(parts, -2)


def centred(t, segments):
    """P t and J t (a row for each segment) of t (..., T, D)."""
    means = torch.stack([part.mean(-2) for part in t.split(segments, -2)], -2)
    return t - spread(means, segments), means


def energy(means, segments):
    """|J t|^2 of segment means (..., S, D), by matrix."""
    rows = means.square().sum(-1).unbind(-1)
    return sum(n * row for n, row in zip(segments, rows, strict=True))


def trunk_sums(y, segments):
    """For tcs and rho: y (B, T, D), the trunk a block returns."""
    y = exact(y)
    sums = {"samples": y.new_full((), len(y))}
    for end, part in zip(SEGMENTS, y.split(segments, 1), strict=False):
        T, mean = part.shape[1], part.mean(1)
        if T > 1:
            unit = torch.nn.functional.normalize(part, dim=-1, eps=1e-12)
            cosines = (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))) / (T * (T - 1))
            sums[f"tcs{end}"] = cosines.sum()
        sums[f"J{end}"] = T**0.5 * mean.norm(dim=-1).sum()
        sums[f"P{end}"] = (part - mean[:, None]).flatten(1).norm(dim=-1).sum()
    return sums


def attention_sums(q, k, x, segments):
    """For contraction, retention, leakage, row_diversity: q, k (B, T, H, Dh), x (B, T, D)."""
    q, k, x = exact(q).transpose(1, 2), exact(k).transpose(1, 2), exact(x)
    A = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, -1)
    PA, _ = centred(A, segments)
    PAP = centred(PA.transpose(2, 3), segments)[0].transpose(2, 3)
    JA = A - PA
    Px, _ = centred(x, segments)
    kept = PAP @ Px[:, None]
    starts = (sum(segments[:i]) for i in range(len(segments)))
    rows = torch.stack([JA[:, :, start] for start in starts], 2)  # J A has one for each segment
    leaked = rows @ Px[:, None]
    return {
        "maps": A.new_full((), A.shape[0] * A.shape[1]),
        "contraction": spectral_norm(PAP.flatten(0, 1)).sum(),
        "kept": kept.square().sum(),
        "leaked": energy(leaked, segments).sum(),
        "centred": Px.square().sum() * A.shape[1],
        "row_diversity": (PA.flatten(2).norm(dim=-1) / A.flatten(2).norm(dim=-1)).sum(),
    }


def spectral_norm(t):
    """The largest singular value of matrices (N, T, T): tr((t^T t)^n)^(1/2n), n = 2^SQUARINGS.

    Products alone: no solver that loops over matrices on a GPU, no random start.
    """
    M = t.transpose(1, 2) @ t
    log, tiny = 0.0, torch.finfo(t.dtype).tiny
    for i in range(SQUARINGS + 1):
        if i % RESCALED == 0 or i == SQUARINGS:
            trace = M.diagonal(dim1=1, dim2=2).sum(1).clamp_min(tiny)
            log = log + trace.log() / 2**i
            M = M / trace[:, None, None]
        if i < SQUARINGS:
            M = M @ M
    return torch.where(t.abs().amax((1, 2)) > tiny**0.5, (log / 2).exp(), 0.0)


def writer_sums(h, d, segments):
    """For A and kappa: what a writer read, h (B, T, Din), and the gradient of its result, d."""
    h, d, sums = exact(h), exact(d), {}
    for end, hs, ds in zip(SEGMENTS, h.split(segments, 1), d.split(segments, 1), strict=False):
        T = hs.shape[1]
        if T == 1:
            continue
        greatest = ds.abs().amax((1, 2), keepdim=True)  # squares of squares: not of tiny numbers
        ds = ds / greatest.clamp_min(torch.finfo(ds.dtype).tiny)
        H, D = hs @ hs.transpose(1, 2), ds @ ds.transpose(1, 2)
        product = H.mul_(D)  # in place: T x T for each sample
        own = product.diagonal(dim1=1, dim2=2).clone()  # |d_t|^2 |h_t|^2
        sums[f"A{end}"] = (product.sum((1, 2)) / own.sum(1)).sum()
        norms = own.sqrt().clamp_min(torch.finfo(own.dtype).tiny)  # 0 where a token has none
        cosines = (product / norms[:, None] / norms[:, :, None]).clamp_(
            -1, 1
        )  # where own underflows
        cosines.diagonal(dim1=1, dim2=2).zero_()
        sums[f"kappa_signed{end}"] = cosines.sum() / T  # (T - 1) / T(T - 1)
        sums[f"kappa{end}"] = cosines.abs_().sum() / T
    return sums


def writer_gradient(h, d, segments):
    """The two parts of the gradient of a writer's weight, (D, Din) each; their sum is all of it."""
    Ph, h_mean = centred(exact(h), segments)
    Pd, d_mean = centred(exact(d), segments)
    pairs = zip(segments, d_mean.unbind(1), h_mean.unbind(1), strict=True)
    G_mean = sum(n * d.t() @ h for n, d, h in pairs)
    return G_mean, Pd.flatten(0, 1).t() @ Ph.flatten(0, 1)


def merge_sums(merge, x, f, segments):
    """For tr_ratio and var_gain: the trunk x and the branch f that a merge is given."""
    x, f = exact(x), exact(f)
    Px, jx = centred(x, segments)
    Pf, jf = centred(f, segments)
    gains = {name: exact(gain) for name, gain in gains_of(merge).items()}
    if "alpha" in gains:
        Pu, ju = gains["beta"] * Pf, gains["alpha"] * (jf - jx)
    else:
        scale = gains.get("scale", 1.0)
        Pu, ju = scale * Pf, scale * jf
    sums = {}
    for name, P, j in (("x", Px, jx), ("f", Pf, jf), ("u", Pu, ju)):
        sums[f"P{name}"] = P.square().sum()
        sums[name] = sums[f"P{name}"] + energy(j, segments).sum()
    return sums


def gains_of(merge):
    """The gains of a merge: alpha and beta, scale, or none."""
    if isinstance(merge, mv.MVSplitRMSNorm):
        return {"alpha": merge.alpha, "beta": merge.beta}
    return {} if merge.scale is None else {"scale": merge.scale}


def gain_statistics(merge):
    """Mean, least and greatest of each gain of a merge, signs kept."""
    table = {}
    for name, gain in gains_of(merge).items():
        gain = exact(gain)
        table[f"{name}_mean"] = gain.mean()
        table[f"{name}_min"], table[f"{name}_max"] = gain.aminmax()
    return table


def finished_trunk(sums):
    """tcs and rho of what trunk_sums gave."""
    row = {}
    for end in SEGMENTS:
        if f"tcs{end}" in sums:
            row[f"tcs{end}"] = sums[f"tcs{end}"] / sums["samples"]
        if f"J{end}" in sums:
            row[f"rho{end}"] = sums[f"J{end}"] / sums[f"P{end}"]
    return row


def finished_attention(sums):
    """The metrics of attention_sums."""
    return {
        "contraction": sums["contraction"] / sums["maps"],
        "retention": sums["kept"] / sums["centred"],
        "leakage": (sums["leaked"] / sums["centred"]).sqrt(),
        "row_diversity": sums["row_diversity"] / sums["maps"],
    }


def finished_writer(sums, samples):
    """The metrics of writer_sums and merge_sums over a number of samples."""
    means = [f"{name}{end}" for name in ("A", "kappa", "kappa_signed") for end in SEGMENTS]
    row = {name: sums[name] / samples for name in means if name in sums}
    for name, update in (("", "f"), ("_gated", "u")):
        row[f"tr_ratio{name}"] = (sums[update] / sums["x"]).sqrt()
        row[f"var_gain{name}"] = (sums[f"P{update}"] / sums["Px"]).sqrt()
    return row
