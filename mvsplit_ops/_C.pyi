"""Types of the CPU kernels, which csrc/host/module.cpp binds.

Each operator has `<op>_fwd` and `<op>_bwd` with the arguments and results that `_register.py`
registers. A statistic, and the gradient of a parameter, has the accumulator dtype: float64 for
float64 activations, else float32. A result that does not exist is an empty tensor. Rotary tables
are (T, Dh/2), (1, T, Dh/2) or (B, T, Dh/2) of any floating-point dtype, with any strides.
"""

from collections.abc import Sequence

from torch import Tensor

_Two = tuple[Tensor, Tensor]
_Four = tuple[Tensor, Tensor, Tensor, Tensor]
_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

def rope_fwd(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool, /
) -> Tensor: ...
def rope_bwd(
    dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool, /
) -> Tensor: ...
def qk_norm_fwd(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, /
) -> _Four:
    """Return q, k, q_rstd, k_rstd."""

def qk_norm_bwd(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    /,
) -> _Four:
    """Return dq, dk, dq_weight, dk_weight. Without a weight, q and k are the results of forward."""

def rope_qk_norm_fwd(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    interleaved: bool,
    conjugate: bool,
    norm_first: bool,
    /,
) -> _Four:
    """Return q, k, q_rstd, k_rstd."""

def rope_qk_norm_bwd(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    interleaved: bool,
    conjugate: bool,
    norm_first: bool,
    /,
) -> _Four:
    """Return dq, dk, dq_weight, dk_weight.

    With rotation first and without a weight, q and k are the results of forward.
    """

def swiglu_fwd(x: Tensor, up: Tensor | None, gate_first: bool, /) -> Tensor:
    """Return y. Without `up`, x is packed; else x is the gate."""

def swiglu_bwd(dy: Tensor, x: Tensor, up: Tensor | None, gate_first: bool, /) -> _Two:
    """Return dx and dup; dup is empty if x is packed."""

def mvsplit_rmsnorm_fwd(
    x: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    jx: Tensor | None,
    segments: Sequence[int],
    eps: float,
    carry: bool,
    /,
) -> _Five:
    """Return y, jy (empty unless `carry`), rstd, jx (empty if it was passed), jf."""

def mvsplit_rmsnorm_bwd(
    dy: Tensor,
    saved: Tensor,
    f: Tensor,
    alpha: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    jx: Tensor,
    jf: Tensor,
    segments: Sequence[int],
    /,
) -> _Five:
    """Return dx, df, dalpha, dbeta, dweight. `saved` is x with a weight, else y."""

def residual_rmsnorm_fwd(
    x: Tensor, f: Tensor, scale: Tensor | None, weight: Tensor | None, eps: float, /
) -> _Two:
    """Return y, rstd."""

def residual_rmsnorm_bwd(
    dy: Tensor,
    saved: Tensor,
    f: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor,
    /,
) -> _Four:
    """Return dx, df (empty without a scale: it equals dx), dscale, dweight.

    `saved` is x with a scale or a weight, else y.
    """

def capabilities() -> list[str]:
    """Return the instruction sets that were compiled in and that this processor runs."""

def capability() -> str:
    """Return the instruction set in use."""

def set_capability(name: str, /) -> None:
    """Use another of capabilities(), for example in a test."""
