"""The operators that are measured, as data: inputs, byte counts and calls per optimizer step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mvsplit_ops as mv
from mvsplit_ops import reference


@dataclass(frozen=True)
class Shape:
    """B samples of `segments` tokens, width D in H heads, SwiGLU width F. Default: the paper's."""

    B: int = 4
    segments: tuple[int, ...] = (256, 64)
    D: int = 1024
    H: int = 8
    F: int = 3072
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    @property
    def T(self) -> int:
        return sum(self.segments)

    @property
    def Dh(self) -> int:
        return self.D // self.H

    @property
    def pass_bytes(self) -> int:
        """Bytes of one pass: reading or writing a (B, T, D) tensor once."""
        return self.B * self.T * self.D * self.dtype.itemsize


Tensors = Sequence[Tensor]
Kwargs = dict[str, Any]
Inputs = tuple[Tensors, Tensors, Kwargs]  # activations and parameters, constants, keywords
Operator = Callable[..., Any]  # returns a tensor or a tuple of tensors
Results = tuple[Tensor, ...]
Function = Callable[[Tensors, Tensors, Kwargs], Results]


def in_order(op: Operator, activations: Tensors, constants: Tensors, kwargs: Kwargs) -> Any:
    """Call the operator with activations, then constants, as positional arguments."""
    return op(*activations, *constants, **kwargs)


def one_by_one(op: Operator, activations: Tensors, constants: Tensors, kwargs: Kwargs) -> Any:
    """Call the operator once for each activation: RoPE of q, then of k."""
    return tuple(op(t, *constants, **kwargs) for t in activations)


def carried(op: Operator, activations: Tensors, constants: Tensors, kwargs: Kwargs) -> Any:
    """Call a merge of a chain: the constant is jx; the mean of the result is dropped."""
    (jx,) = constants
    return op(*activations, jx=jx, **kwargs)[:1]


@dataclass(frozen=True)
class Case:
    """One operator of the benchmark.

    op         public name; its eager definition has the same name in mvsplit_ops.reference
    title      the paper's name
    inputs     (Shape, Generator) -> (activations, constants, keyword arguments)
    fwd, bwd   passes of (B, T, D) that must move in one call; one of (B, T, F) is F / D
    per_block  calls in one block
    call       how the operator takes its inputs
    part_of    the case that replaces this one in totals
    profiled   whether the paper's operator profile has it
    """

    op: str
    title: str
    inputs: Callable[[Shape, torch.Generator], Inputs]
    fwd: Callable[[Shape], float]
    bwd: Callable[[Shape], float]
    per_block: int = 1
    call: Callable[[Operator, Tensors, Tensors, Kwargs], Any] = in_order
    part_of: str | None = None
    profiled: bool = True

    def example(self, shape: Shape, seed: int = 0) -> Inputs:
        """Return inputs at a shape, the same for the same seed and device."""
        return self.inputs(shape, generator_on(shape.device, seed))

    def bytes_to_move(self, shape: Shape) -> tuple[float, float]:
        """Return the bytes that a forward and a backward call must move."""
        return self.fwd(shape) * shape.pass_bytes, self.bwd(shape) * shape.pass_bytes

    def function(self, implementation: Operator) -> Function:
        """Return the call that is timed: (activations, constants, kwargs) -> tuple of results."""

        def call(activations: Tensors, constants: Tensors, kwargs: Kwargs) -> tuple[Tensor, ...]:
            out = self.call(implementation, activations, constants, kwargs)
            return out if isinstance(out, tuple) else (out,)

        return call

    @property
    def reference(self) -> Function:
        return self.function(getattr(reference, self.op))

    @property
    def eager(self) -> Function:
        """The definition in plain arithmetic: the baseline of times and bytes."""
        return plain(self.reference)

    def fused(self, backend: str | None = None) -> Function:
        op = getattr(mv, self.op)
        return self.function(lambda *args, **kwargs: op(*args, backend=backend, **kwargs))


class PlainArithmetic:
    """Within the block, mvsplit_ops.reference computes in the dtypes of its inputs.

    This is eager code as it is usually written: each operation rounds its result to 16 bits, where
    the backend `reference` computes in float32 and rounds once. It moves fewer bytes and errs more.
    """

    def __enter__(self) -> None:
        self._widen, reference.widen = reference.widen, _as_stored

    def __exit__(self, *error: object) -> None:
        reference.widen = self._widen


def _as_stored(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t


def plain(function: Function) -> Function:
    """Return a function whose definitions compute in the dtypes of their inputs."""

    def call(activations: Tensors, constants: Tensors, kwargs: Kwargs) -> Results:
        with PlainArithmetic():
            return function(activations, constants, kwargs)

    return call


def generator_on(device: str | torch.device, seed: int) -> torch.Generator:
    """Return a generator on the GPU that uses its numbers: a CPU would take seconds per GB."""
    return torch.Generator(device if is_cuda(device) else "cpu").manual_seed(seed)


def is_cuda(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def randn(
    shape: Shape,
    generator: torch.Generator,
    *sizes: int,
    dtype: torch.dtype | None = None,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    t = torch.randn(sizes, generator=generator, dtype=torch.float64, device=generator.device)
    return (t * std + mean).to(shape.device, dtype or shape.dtype)


def rotary_tables(shape: Shape, generator: torch.Generator) -> Results:
    """Return cos and sin (T, Dh/2) of random angles, float32."""
    sizes, device = (shape.T, shape.Dh // 2), generator.device
    angle = torch.rand(sizes, generator=generator, dtype=torch.float64, device=device) * 6.3
    return tuple(t.to(shape.device, torch.float32) for t in (angle.cos(), angle.sin()))


def heads(shape: Shape, generator: torch.Generator) -> Results:
    """Return random q and k (B, T, H, Dh)."""
    return tuple(randn(shape, generator, shape.B, shape.T, shape.H, shape.Dh) for _ in "qk")


def _rope(shape: Shape, g: torch.Generator) -> Inputs:
    return heads(shape, g), rotary_tables(shape, g), {}


def _qk_norm(shape: Shape, g: torch.Generator) -> Inputs:
    return heads(shape, g), (), {}


def _swiglu(shape: Shape, g: torch.Generator) -> Inputs:
    return (randn(shape, g, shape.B, shape.T, 2 * shape.F),), (), {}


def _merge(shape: Shape, g: torch.Generator) -> Inputs:
    x, f = (randn(shape, g, shape.B, shape.T, shape.D) for _ in "xf")
    alpha = randn(shape, g, shape.D, dtype=torch.float32, std=0.1)
    beta = randn(shape, g, shape.D, dtype=torch.float32, mean=1.0, std=0.1)
    return (x, f, alpha, beta), (), {"segments": list(shape.segments)}


def _carried(shape: Shape, g: torch.Generator) -> Inputs:
    activations, _, kwargs = _merge(shape, g)
    acc = torch.promote_types(shape.dtype, torch.float32)
    return activations, (reference.segment_means(activations[0], shape.segments).to(acc),), kwargs


def _layerscale(shape: Shape, g: torch.Generator) -> Inputs:
    (x, f, _, scale), _, _ = _merge(shape, g)
    return (x, f, scale), (), {}


def _passes(count: float) -> Callable[[Shape], float]:
    return lambda shape: count


CASES = (
    Case("rope", "RoPE (q, k)", _rope, _passes(4), _passes(4),
         call=one_by_one, part_of="rope_qk_norm"),
    Case("qk_norm", "QK-Norm", _qk_norm, _passes(4), _passes(6), part_of="rope_qk_norm"),
    Case("rope_qk_norm", "RoPE + QK-Norm", _rope, _passes(4), _passes(6)),
    Case("swiglu", "SwiGLU", _swiglu, lambda s: 3 * s.F / s.D, lambda s: 5 * s.F / s.D),
    Case("mvsplit_rmsnorm", "MV-Split + RMSNorm", _merge, _passes(3), _passes(5), per_block=2),
    Case("mvsplit_rmsnorm_with_mean", "MV-Split + RMSNorm, carried mean", _carried,
         _passes(3), _passes(5), per_block=2, call=carried, profiled=False),
    Case("residual_rmsnorm", "LayerScale + RMSNorm", _layerscale,
         _passes(3), _passes(5), per_block=2, profiled=False),
)  # fmt: skip
PROFILE = tuple(case for case in CASES if case.profiled)
CASES_BY_OP = {case.op: case for case in CASES}

# arXiv 2605.06169: operators per optimizer step, eager and its fused kernels, 400 blocks on 8 H100.
PAPER_MS = {"eager": 1697.4, "fused": 614.0}
PAPER_NOTE = (
    "The paper's own figures, on 8 H100 at its batch, not this machine: "
    "{eager} ms eager, {fused} ms with its kernels, {ratio:.2f}x."
).format(**PAPER_MS, ratio=PAPER_MS["eager"] / PAPER_MS["fused"])


def calls_per_step(case: Case, blocks: int) -> tuple[int, int]:
    """Return (forward, backward) calls of one optimizer step, three of four blocks checkpointed.

    A checkpointed block runs its forward again in backward: 400 blocks make 700 forward and 400
    backward calls.
    """
    recomputed = blocks * 3 // 4
    return (blocks + recomputed) * case.per_block, blocks * case.per_block
