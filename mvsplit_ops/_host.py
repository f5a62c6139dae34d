"""What the Triton and CUDA launchers share: allocation, strides, checks, modes of head kernels.

The `require_` functions check the arguments of a backward kernel, so that it cannot read out of
bounds; mvsplit_ops/_check.py checks what a user passes to an operator.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Tables = tuple[Tensor, Tensor] | tuple[()]  # cos and sin, or none
TableStrides = tuple[tuple[int, int, int], ...]  # of a sample, a token and a pair
_T = TypeVar("_T", Tensor, Tensor | None)

# Most rows of partial sums of a head weight's gradient: several programs or blocks for each of 132
# SMs, and few rows to add.
MOST_PARTIALS = 1024

MOST_SEGMENTS = 64  # of a merge: the CUDA kernels take the table of segments as an argument of 1 KB
TABLE_DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


class HeadModes(NamedTuple):
    """Modes of the kernel pair of rope, qk_norm and rope_qk_norm."""

    interleaved: bool = False  # pairs (2i, 2i + 1) instead of (i, i + Dh/2)
    conjugate: bool = False  # rotate by -theta
    norm_first: bool = False  # normalise and weigh before the rotation


class HeadLaunchers:
    """The launchers of rope, qk_norm and rope_qk_norm, which are modes of one pair of kernels.

    forward   (xs, weights, tables, eps, modes, norm=True) -> (results, rstds) of x, or of q and k
    backward  (dys, saved, rstds, weights, tables, modes) -> dq, dk, dq_weight, dk_weight
    """

    def __init__(
        self,
        forward: Callable[..., tuple[list[Tensor], list[Tensor]]],
        backward: Callable[..., tuple[Tensor, ...]],
    ) -> None:
        self._forward, self._backward = forward, backward

    def rope_fwd(
        self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool
    ) -> Tensor:
        modes = HeadModes(interleaved, conjugate)
        return self._forward([x], [None], (cos, sin), 0.0, modes, norm=False)[0][0]

    def rope_bwd(
        self, dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool
    ) -> Tensor:
        return self.rope_fwd(dy, cos, sin, interleaved, not conjugate)

    def qk_norm_fwd(
        self, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        ys, rstds = self._forward([q, k], [q_weight, k_weight], (), eps, HeadModes())
        return *ys, *rstds

    def qk_norm_bwd(
        self,
        dq: Tensor,
        dk: Tensor,
        q: Tensor,
        k: Tensor,
        q_rstd: Tensor,
        k_rstd: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
    ) -> tuple[Tensor, ...]:
        rstds, weights = [q_rstd, k_rstd], [q_weight, k_weight]
        return self._backward([dq, dk], [q, k], rstds, weights, (), HeadModes())

    def rope_qk_norm_fwd(
        self,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        *modes: bool,
    ) -> tuple[Tensor, ...]:
        weights, tables = [q_weight, k_weight], (cos, sin)
        ys, rstds = self._forward([q, k], weights, tables, eps, HeadModes(*modes))
        return *ys, *rstds

    def rope_qk_norm_bwd(
        self,
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
        *modes: bool,
    ) -> tuple[Tensor, ...]:
        rstds, weights, tables = [q_rstd, k_rstd], [q_weight, k_weight], (cos, sin)
        return self._backward([dq, dk], [q, k], rstds, weights, tables, HeadModes(*modes))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which kernels of an activation dtype compute and store statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_empty(like: Tensor, shape: Sequence[int] | int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def new_statistics(like: Tensor, *shape: int) -> Tensor:
    return new_empty(like, shape, accumulator_dtype(like.dtype))


def describe(t: object) -> str:
    """Return `bfloat16 (4, 320, 1024)` for a tensor, the repr of anything else."""
    if isinstance(t, Tensor):
        return f"{format_dtypes(t.dtype)} {format_shape(t.shape)}"
    return repr(t)


def format_dtypes(*dtypes: torch.dtype, separator: str = " or ") -> str:
    """Return the names of dtypes, each once."""
    return separator.join(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes))


def format_shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def require(name: str, t: Tensor | None, shape: Sequence[int], *dtypes: torch.dtype) -> None:
    """Raise RuntimeError unless t has this shape and one of these dtypes."""
    if t is None or t.dtype not in dtypes or tuple(t.shape) != tuple(shape):
        expected = f"{format_dtypes(*dtypes)} {format_shape(shape)}"
        raise RuntimeError(f"mvsplit_ops: {name} must be {expected}, got {describe(t)}")


def require_parameter(name: str, p: Tensor | None, size: int, dtype: torch.dtype) -> None:
    """Raise RuntimeError unless p is None or (size,) in float32 or the dtype of the activations."""
    if p is not None:
        require(name, p, (size,), torch.float32, dtype)


def require_merge(
    dy: Tensor,
    saved: Tensor,
    f: Tensor,
    parameters: Sequence[Tensor | None],
    rstd: Tensor,
    means: tuple[Tensor, Tensor],
    segments: Sequence[int],
) -> None:
    """Check the arguments of mvsplit_rmsnorm_bwd.

    parameters: alpha, beta, weight;  means: jx, jf
    """
    B, T, D = dy.shape
    if sum(segments) != T:
        raise RuntimeError(f"mvsplit_ops: segments must sum to T = {T}, got {tuple(segments)}")
    require("saved", saved, dy.shape, dy.dtype)
    require("f", f, dy.shape, dy.dtype)
    for name, p in zip(("alpha", "beta", "weight"), parameters, strict=True):
        require_parameter(name, p, D, dy.dtype)
    require("rstd", rstd, (B, T), accumulator_dtype(dy.dtype))
    for name, t in zip(("jx", "jf"), means, strict=True):
        require(name, t, (B, len(segments), D), accumulator_dtype(dy.dtype))


def require_residual(
    dy: Tensor,
    saved: Tensor,
    f: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor,
) -> None:
    """Check the arguments of residual_rmsnorm_bwd."""
    B, T, D = dy.shape
    require("saved", saved, dy.shape, dy.dtype)
    require("rstd", rstd, (B, T), accumulator_dtype(dy.dtype))
    if f is not None or scale is not None or weight is not None:
        require("f", f, dy.shape, dy.dtype)
    require_parameter("scale", scale, D, dy.dtype)
    require_parameter("weight", weight, D, dy.dtype)


def require_heads(
    dys: Sequence[Tensor],
    saved: Sequence[Tensor],
    rstds: Sequence[Tensor],
    weights: Sequence[Tensor | None],
) -> None:
    """Check the arguments of qk_norm_bwd and rope_qk_norm_bwd, each a pair for q and k."""
    B, T, _, D = saved[0].shape
    for dy, x, rstd, weight in zip(dys, saved, rstds, weights, strict=True):
        require("dy", dy, (B, T, x.shape[2], D), saved[0].dtype)
        require("saved", x, dy.shape, dy.dtype)
        require("rstd", rstd, x.shape[:3], accumulator_dtype(x.dtype))
        require_parameter("weight", weight, x.shape[3], x.dtype)


def to_contiguous(*tensors: _T) -> list[_T]:
    """Return each tensor made contiguous, and None for None."""
    return [None if t is None else t.contiguous() for t in tensors]


def to_unit_stride(t: Tensor) -> Tensor:
    """Return t, or a copy, with neighbours in the last dimension one element apart."""
    return t if t.stride(-1) == 1 else t.contiguous()


def to_strided_rows(t: Tensor) -> Tensor:
    """Return t, or a copy, whose rows (the last dimension) are a constant stride apart."""
    return t if row_stride(t) is not None else t.contiguous()


def row_stride(t: Tensor) -> int | None:
    """Return the elements from a row (the last dimension) to the next; None if it varies."""
    if t.is_contiguous():  # also where dimensions of size 1 have other strides
        return t.shape[-1]
    (*sizes, width), (*strides, unit) = t.shape, t.stride()
    if unit != 1 and width > 1:
        return None
    row = following = None  # `following`: the stride with which the dimension outside continues
    for n, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if n == 1:
            continue
        if row is None:
            row = stride
        elif stride != following:
            return None
        following = n * stride
    return row


def table_strides(tables: Tables, x: Tensor) -> TableStrides:
    """Check cos and sin, and return the strides of cos and of sin, once if they are equal."""
    if not tables:
        return ()
    cos, sin = tables
    B, T, _, D = x.shape
    shared = cos.dim() == 2 or cos.shape[0] == 1
    samples = () if cos.dim() == 2 else (1 if shared else B,)
    shape = *samples, max(T, cos.shape[-2]), D // 2
    require("cos", cos, shape, *TABLE_DTYPES)
    require("sin", sin, shape, *TABLE_DTYPES)
    strides = [cos.stride()] if cos.stride() == sin.stride() else [cos.stride(), sin.stride()]
    return tuple((0 if shared else s[0], s[-2], s[-1]) for s in strides)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """Return the least power of two that is not less than n."""
    return 1 << max(n - 1, 0).bit_length()


def count_blocks(segments: Sequence[int], share: int) -> int:
    """Return the blocks of at most `share` tokens of a sample; none crosses a segment's end."""
    return sum(ceil_div(tokens, share) for tokens in segments)
