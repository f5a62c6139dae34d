"""RMSNorm of the heads of q and k."""

import torch
from torch import Tensor

from mvsplit_ops import reference
from mvsplit_ops._check import (
    check_activation,
    check_parameter,
    check_width,
    expect,
    sizes_equal,
    to_eps,
)
from mvsplit_ops._host import accumulator_dtype
from mvsplit_ops._register import Context, Gradients, Kernel, Op, expose, register

FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def check_heads(
    op: str, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None
) -> None:
    """Check that q (B, T, H, Dh) and k (B, T, Hk, Dh) fit together, and that weights are (Dh,)."""
    check_activation(op, "q", q, "B T H Dh")
    check_width(op, "Dh, the last dimension of q,", q)
    check_activation(op, "k", k, "B T H Dh", like=("q", q))
    B, T, _, Dh = q.shape
    samples, tokens, _, width = k.shape
    fits = sizes_equal((samples, tokens, width), (B, T, Dh))
    if fits is not True:
        expect(fits, op, "k", lambda: (f"({B}, {T}, heads, {Dh}) to go with q", tuple(k.shape)))
    check_parameter(op, "q_weight", q_weight, Dh, q)
    check_parameter(op, "k_weight", k_weight, Dh, q)


def fake_fwd(q: Tensor, k: Tensor, *_: object) -> FourTensors:
    """Return empty outputs of qk_norm_fwd and of rope_qk_norm_fwd."""
    q_rstd, k_rstd = (t.new_empty(t.shape[:3], dtype=accumulator_dtype(t.dtype)) for t in (q, k))
    return q.new_empty(q.shape), k.new_empty(k.shape), q_rstd, k_rstd


def fake_bwd(
    dq: Tensor, dk: Tensor, q_weight: Tensor | None, k_weight: Tensor | None
) -> FourTensors:
    """Return empty outputs of qk_norm_bwd and of rope_qk_norm_bwd."""
    dq_weight, dk_weight = (
        dq.new_empty(0 if w is None else dq.shape[3], dtype=accumulator_dtype(dq.dtype))
        for w in (q_weight, k_weight)
    )
    return dq.new_empty(dq.shape), dk.new_empty(dk.shape), dq_weight, dk_weight


def tensor_to_save(x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
    """Return what backward reads: y without a weight (attention saves it too), else x."""
    return y if weight is None else x


def zeros_for_missing(
    dq: Tensor | None, dk: Tensor | None, q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """Return both gradients; that of a result on which nothing depends is zero."""
    dq = torch.zeros_like(q) if dq is None else dq
    return dq, torch.zeros_like(k) if dk is None else dk


def _check_inputs(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> None:
    check_heads("qk_norm", q, k, q_weight, k_weight)


def _save(
    ctx: Context,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    outputs: FourTensors,
) -> None:
    q_out, k_out, *rstd = outputs
    q, k = tensor_to_save(q, q_out, q_weight), tensor_to_save(k, k_out, k_weight)
    ctx.save_for_backward(q, k, *rstd, q_weight, k_weight)


def _backward(ctx: Context, bwd: Kernel, dq: Tensor | None, dk: Tensor | None) -> Gradients:
    q, k, *rest = ctx.saved_tensors
    q_weight, k_weight = rest[-2:]
    dq, dk, dq_weight, dk_weight = bwd(*zeros_for_missing(dq, dk, q, k), q, k, *rest)
    dq_weight = None if q_weight is None else dq_weight
    dk_weight = None if k_weight is None else dk_weight
    return dq, dk, dq_weight, dk_weight, None


def _fake_bwd(dq: Tensor, dk: Tensor, *saved: Tensor | None) -> FourTensors:
    return fake_bwd(dq, dk, *saved[-2:])


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
        rowwise=True,
    )
)


@expose(
    "(Tensor q, Tensor k, Tensor? q_weight=None, Tensor? k_weight=None, *, "
    "float eps=1e-6, str? backend=None) -> (Tensor, Tensor)"
)
def qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the RMSNorm of every head of q and k: x / sqrt(mean(x^2) + eps) * weight over Dh.

        q, k = mv.qk_norm(q, k)

    q                   (B, T, H, Dh)    fp32, bf16, fp16, fp64; any row stride
    k                   (B, T, Hk, Dh)   dtype of q; Hk may differ from H (grouped-query attention)
    q_weight, k_weight  (Dh,)            fp32 or dtype of q; optional, the paper uses none
    returns             q, k             shapes and dtype of q and k, contiguous

    fp32 arithmetic (fp64 for fp64), bit-identical from run to run. Backward reads dy, the result
    and 1/rms; with a weight, the input instead of the result.
    Nested tensors of layout torch.jagged are accepted.
    ValueError: shape, dtype, device. RuntimeError: the backend cannot run here, or the derivative
    has no kernel (forward mode, second derivatives; backend='reference' has them).
    Henry et al., Query-Key Normalization, arXiv 2010.04245; Zhang and Sennrich, RMSNorm, arXiv
    1910.07467.
    """
    return _OP(q, k, q_weight, k_weight, to_eps("qk_norm", eps), backend=backend)
