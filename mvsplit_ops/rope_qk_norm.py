"""RoPE and QK-Norm of q and k in one pass."""

from typing import Any

from torch import Tensor

from mvsplit_ops import reference
from mvsplit_ops._check import check_tables, to_eps
from mvsplit_ops._register import Context, Gradients, Kernel, Op, expose, register
from mvsplit_ops._tables import to_half_width
from mvsplit_ops.qk_norm import (
    FourTensors,
    check_heads,
    fake_bwd,
    fake_fwd,
    tensor_to_save,
    zeros_for_missing,
)
from mvsplit_ops.rope import require_constant_tables

_NAME = "rope_qk_norm"


def _check_inputs(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *_: object,
) -> None:
    check_heads(_NAME, q, k, q_weight, k_weight)
    check_tables(_NAME, cos, sin, q)


def _save(
    ctx: Context,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    *modes_and_outputs: Any,
) -> None:
    require_constant_tables(_NAME, ctx, 2)
    *modes, (q_out, k_out, *rstd) = modes_and_outputs
    ctx.modes = interleaved, conjugate, norm_first = tuple(modes)
    if not norm_first:  # else y is the rotated n, which only unit tables could turn back
        q, k = tensor_to_save(q, q_out, q_weight), tensor_to_save(k, k_out, k_weight)
    ctx.save_for_backward(q, k, cos, sin, *rstd, q_weight, k_weight)


def _backward(ctx: Context, bwd: Kernel, dq: Tensor | None, dk: Tensor | None) -> Gradients:
    q, k, *rest = ctx.saved_tensors
    q_weight, k_weight = rest[-2:]
    dq, dk, dq_weight, dk_weight = bwd(*zeros_for_missing(dq, dk, q, k), q, k, *rest, *ctx.modes)
    dq_weight = None if q_weight is None else dq_weight
    dk_weight = None if k_weight is None else dk_weight
    return dq, dk, None, None, dq_weight, dk_weight, None, None, None, None


def _fake_bwd(dq: Tensor, dk: Tensor, *saved_and_modes: Any) -> FourTensors:
    return fake_bwd(dq, dk, *saved_and_modes[-5:-3])


_OP = register(
    Op(
        name=_NAME,
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


@expose(
    "(Tensor q, Tensor k, Tensor cos, Tensor? sin=None, Tensor? q_weight=None, "
    "Tensor? k_weight=None, *, float eps=1e-6, bool interleaved=False, "
    "bool conjugate=False, bool norm_first=False, str? backend=None) -> (Tensor, Tensor)"
)
def rope_qk_norm(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    interleaved: bool = False,
    conjugate: bool = False,
    norm_first: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return qk_norm(rope(q), rope(k)), or with norm_first rope of qk_norm(q, k), in one pass.

        q, k = mv.rope_qk_norm(q, k, theta.cos(), theta.sin())  # theta (T, Dh/2) in radians

    q                   (B, T, H, Dh)    fp32, bf16, fp16, fp64; Dh even; any row stride
    k                   (B, T, Hk, Dh)   dtype of q; Hk may differ from H
    cos, sin            (T, Dh/2), ..    every form that rope takes, also one complex table
    q_weight, k_weight  (Dh,)            fp32 or dtype of q; optional
    interleaved         bool             pairs (2i, 2i + 1) instead of (i, i + Dh/2)
    conjugate           bool             rotate by -theta
    norm_first          bool             normalise and weigh before the rotation
    returns             q, k             shapes and dtype of q and k, contiguous

    A rotation preserves the norm of a row, so without weights both orders are the same function;
    tables whose pairs are not unit vectors (YaRN's) are used as they are. Moves 2 reads and 2
    writes forward, 4 and 2 backward. Backward reads dy, the result and 1/rms; with a weight or
    norm_first, the input instead of the result. fp32 arithmetic (fp64 for fp64), bit-identical from
    run to run.
    ValueError: shape, dtype, device, or a table that requires grad. RuntimeError: the backend
    cannot run here, or the derivative has no kernel (forward mode, second derivatives;
    backend='reference' has them).
    arXiv 2605.06169: RoPE, then QK-Norm without weights.
    """
    cos, sin = to_half_width(_NAME, cos, sin, q, interleaved)
    modes = interleaved, conjugate, norm_first
    return _OP(q, k, cos, sin, q_weight, k_weight, to_eps(_NAME, eps), *modes, backend=backend)
