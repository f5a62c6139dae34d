"""RMSNorm of the heads of q and k."""

import torch

from mvsplit_ops import _check, reference
from mvsplit_ops._host import accumulator
from mvsplit_ops._register import Op, expose, register


def check_heads(op, q, k, q_weight, k_weight):
    """q (B, T, H, Dh) and k (B, T, Hk, Dh) belong together; weights are (Dh,)."""
    _check.activation(op, "q", q, "B T H Dh")
    _check.activation(op, "k", k, "B T H Dh", like=("q", q))
    if (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        B, T, _, Dh = q.shape
        _check.fail(op, "k", f"({B}, {T}, heads, {Dh}) to go with q", tuple(k.shape))
    _check.parameter(op, "q_weight", q_weight, q.shape[3], q)
    _check.parameter(op, "k_weight", k_weight, q.shape[3], q)


def fake_fwd(q, k, *_):
    """The outputs of qk_norm_fwd and of rope_qk_norm_fwd."""
    stats = [t.new_empty(t.shape[:3], dtype=accumulator(t.dtype)) for t in (q, k)]
    return q.new_empty(q.shape), k.new_empty(k.shape), *stats


def fake_bwd(dq, dk, q_weight, k_weight):
    """The outputs of qk_norm_bwd and of rope_qk_norm_bwd."""
    weights = (
        dq.new_empty(0 if w is None else dq.shape[3], dtype=accumulator(dq.dtype))
        for w in (q_weight, k_weight)
    )
    return dq.new_empty(dq.shape), dk.new_empty(dk.shape), *weights


def keep(x, y, weight):
    """What backward reads beside dy: y without a weight (attention keeps it too), else x."""
    return y if weight is None else x


def both(dq, dk, q, k):
    """Gradients of both results, zeros for one that nothing depended on."""
    dq = torch.zeros_like(q) if dq is None else dq
    return dq, torch.zeros_like(k) if dk is None else dk


def _check_inputs(q, k, q_weight, k_weight, eps):
    check_heads("qk_norm", q, k, q_weight, k_weight)


def _save(ctx, q, k, q_weight, k_weight, eps, outputs):
    q_out, k_out, *rstd = outputs
    ctx.save_for_backward(
        keep(q, q_out, q_weight), keep(k, k_out, k_weight), *rstd, q_weight, k_weight
    )


def _backward(ctx, bwd, dq, dk):
    q, k, q_rstd, k_rstd, q_weight, k_weight = ctx.saved_tensors
    dq, dk, dq_weight, dk_weight = bwd(
        *both(dq, dk, q, k), q, k, q_rstd, k_rstd, q_weight, k_weight
    )
    return (
        dq,
        dk,
        None if q_weight is None else dq_weight,
        None if k_weight is None else dk_weight,
        None,
    )


def _fake_bwd(dq, dk, q, k, q_rstd, k_rstd, q_weight, k_weight):
    return fake_bwd(dq, dk, q_weight, k_weight)


_OP = register(
    Op(
        name="qk_norm",
        fwd="(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, float eps, str backend) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        bwd="(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor q_rstd, Tensor k_rstd, "
        "Tensor? q_weight, Tensor? k_weight, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
        results=2,
        activations=2,
        reference=reference.qk_norm,
        check=_check_inputs,
        fake_fwd=fake_fwd,
        fake_bwd=_fake_bwd,
        save=_save,
        backward=_backward,
    )
)


def qk_norm(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm over Dh of every head: x / sqrt(mean(x^2) + eps) * weight.

    q                   (B, T, H, Dh)    fp32, bf16, fp16, fp64; any row stride
    k                   (B, T, Hk, Dh)   dtype of q; Hk may differ from H (grouped-query attention)
    q_weight, k_weight  (Dh,)            fp32 or dtype of q; optional, the paper uses none
    returns             q, k             shapes and dtype of q and k, contiguous

    fp32 arithmetic (fp64 for fp64); bit-identical from run to run. Backward reads dy, the result
    and 1/rms; with a weight the input in place of the result.
    ValueError: shape, dtype, device. RuntimeError: the backend cannot run here.
    Henry et al., Query-Key Normalization, arXiv 2010.04245; Zhang and Sennrich, RMSNorm, arXiv
    1910.07467.
    """
    return _OP(q, k, q_weight, k_weight, eps, backend=backend)


expose(
    qk_norm,
    "(Tensor q, Tensor k, Tensor? q_weight=None, Tensor? k_weight=None, *, "
    "float eps=1e-6, str? backend=None) -> (Tensor, Tensor)",
)
