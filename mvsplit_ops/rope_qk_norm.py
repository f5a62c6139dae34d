"""RoPE and QK-Norm of q and k in one pass."""

import torch

from mvsplit_ops import _check, reference
from mvsplit_ops._register import Op, expose, register
from mvsplit_ops.qk_norm import both, check_heads, fake_bwd, fake_fwd, keep
from mvsplit_ops.rope import constant_tables


def _check_inputs(q, k, cos, sin, q_weight, k_weight, eps, interleaved, conjugate, norm_first):
    check_heads("rope_qk_norm", q, k, q_weight, k_weight)
    _check.tables("rope_qk_norm", cos, sin, q)


def _save(
    ctx, q, k, cos, sin, q_weight, k_weight, eps, interleaved, conjugate, norm_first, outputs
):
    constant_tables("rope_qk_norm", ctx, 2)
    q_out, k_out, *rstd = outputs
    kept = q, k  # norm first: y is the rotated n, which only a unit table could be turned back
    if not norm_first:
        kept = keep(q, q_out, q_weight), keep(k, k_out, k_weight)
    ctx.save_for_backward(*kept, cos, sin, *rstd, q_weight, k_weight)
    ctx.flags = interleaved, conjugate, norm_first


def _backward(ctx, bwd, dq, dk):
    q, k, *rest = ctx.saved_tensors
    dq, dk, dq_weight, dk_weight = bwd(*both(dq, dk, q, k), q, k, *rest, *ctx.flags)
    q_weight, k_weight = rest[-2:]
    dq_weight = None if q_weight is None else dq_weight
    dk_weight = None if k_weight is None else dk_weight
    return dq, dk, None, None, dq_weight, dk_weight, None, None, None, None


def _fake_bwd(dq, dk, q, k, cos, sin, q_rstd, k_rstd, q_weight, k_weight, *flags):
    return fake_bwd(dq, dk, q_weight, k_weight)


_OP = register(
    Op(
        name="rope_qk_norm",
        fwd="(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, "
        "float eps, bool interleaved, bool conjugate, bool norm_first, str backend) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        bwd="(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor q_rstd, "
        "Tensor k_rstd, Tensor? q_weight, Tensor? k_weight, bool interleaved, bool conjugate, "
        "bool norm_first, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
        results=2,
        activations=2,
        reference=reference.rope_qk_norm,
        check=_check_inputs,
        fake_fwd=fake_fwd,
        fake_bwd=_fake_bwd,
        save=_save,
        backward=_backward,
    )
)


def rope_qk_norm(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    interleaved: bool = False,
    conjugate: bool = False,
    norm_first: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """qk_norm(rope(q), rope(k)) in one pass; rope(qk_norm(q, k)) with norm_first.

    q                   (B, T, H, Dh)               fp32, bf16, fp16, fp64; any row stride
    k                   (B, T, Hk, Dh)              dtype of q; Hk may differ from H
    cos, sin            (T, Dh/2) or (B, T, Dh/2)   fp32 or dtype of q; see rope
    q_weight, k_weight  (Dh,)                       fp32 or dtype of q; optional
    interleaved         bool                        pairs (2i, 2i+1) instead of (i, i + Dh/2)
    conjugate           bool                        rotate by the negative angle
    norm_first          bool                        weigh before the rotation, not after it
    returns             q, k                        shapes and dtype of q and k, contiguous

    A rotation keeps the norm of a row, so without weights both orders are the same function; tables
    that are not unit (YaRN's) are taken as they are. Moves 2 reads and 2 writes forward, 4 and 2
    backward; backward reads dy, the result and 1/rms (the input in place of the result with a
    weight or norm_first). fp32 arithmetic (fp64 for fp64), bit-identical from run to run.
    ValueError: shape, dtype, device. RuntimeError: the backend cannot run here.
    arXiv 2605.06169: RoPE, then QK-Norm without weights.
    """
    flags = interleaved, conjugate, norm_first
    return _OP(q, k, cos, sin, q_weight, k_weight, eps, *flags, backend=backend)


expose(
    rope_qk_norm,
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight=None, "
    "Tensor? k_weight=None, *, float eps=1e-6, bool interleaved=False, "
    "bool conjugate=False, bool norm_first=False, str? backend=None) -> (Tensor, Tensor)",
)
