"""What is measured, as data: the runner knows no operator by name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import mvsplit_ops as mv
from mvsplit_ops import reference


@dataclass(frozen=True)
class Shape:
    """B samples of `segments` tokens, width D in H heads, SwiGLU width F: the paper's."""

    B: int = 4
    segments: tuple[int, ...] = (256, 64)
    D: int = 1024
    H: int = 8
    F: int = 3072
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    @property
    def T(self):
        return sum(self.segments)

    @property
    def Dh(self):
        return self.D // self.H

    @property
    def pass_bytes(self):
        """Reading or writing one (B, T, D) tensor once."""
        return self.B * self.T * self.D * self.dtype.itemsize


def in_order(op, activations, constants, kwargs):
    """Activations, then constants, as positional arguments."""
    return op(*activations, *constants, **kwargs)


def one_by_one(op, activations, constants, kwargs):
    """The op on each activation on its own: RoPE of q, then of k."""
    return tuple(op(t, *constants, **kwargs) for t in activations)


def carried(op, activations, constants, kwargs):
    """The merge of a chain: the constant is jx, and the mean of the result is of no interest."""
    (jx,) = constants
    return op(*activations, jx=jx, **kwargs)[:1]


@dataclass(frozen=True)
class Case:
    """One operator of the profile.

    op         public name; its eager definition has the same name in mvsplit_ops.reference
    title      the paper's name
    inputs     (Shape, Generator) -> (activations, constants, keyword arguments)
    fwd, bwd   passes of (B, T, D) that must move in one call; one of (B, T, F) is F / D
    per_block  calls in one block
    call       how the operator takes its inputs
    part_of    the case that replaces this one in totals
    profiled   one of the operators of the paper's profile
    """

    op: str
    title: str
    inputs: Callable
    fwd: Callable[[Shape], float]
    bwd: Callable[[Shape], float]
    per_block: int = 1
    call: Callable = in_order
    part_of: str | None = None
    profiled: bool = True

    def example(self, shape, seed=0):
        """Inputs at a shape, the same for the same seed and device."""
        return self.inputs(shape, generator_on(shape.device, seed))

    def function(self, implementation):
        """The call that is timed: activations and parameters -> tuple of results."""

        def call(activations, constants, kwargs):
            out = self.call(implementation, activations, constants, kwargs)
            return out if isinstance(out, tuple) else (out,)

        return call

    @property
    def reference(self):
        return self.function(getattr(reference, self.op))

    def fused(self, backend=None):
        op = getattr(mv, self.op)
        return self.function(lambda *args, **kwargs: op(*args, backend=backend, **kwargs))


def generator_on(device, seed):
    """Random numbers made where they are used: a GPU's gigabytes would take a CPU seconds."""
    on = device if torch.device(device).type == "cuda" else "cpu"
    return torch.Generator(on).manual_seed(seed)


def randn(shape, generator, *sizes, dtype=None, mean=0.0, std=1.0):
    t = torch.randn(sizes, generator=generator, dtype=torch.float64, device=generator.device)
    t = t * std + mean
    return t.to(shape.device, dtype or shape.dtype)


def rotary_tables(shape, generator):
    """cos and sin (T, Dh/2) of random angles, float32."""
    sizes = shape.T, shape.Dh // 2
    angle = (
        torch.rand(sizes, generator=generator, dtype=torch.float64, device=generator.device) * 6.3
    )
    return tuple(t.to(shape.device, torch.float32) for t in (angle.cos(), angle.sin()))


def heads(shape, generator):
    return tuple(randn(shape, generator, shape.B, shape.T, shape.H, shape.Dh) for _ in "qk")


def _rope(shape, g):
    return heads(shape, g), rotary_tables(shape, g), {}


def _qk_norm(shape, g):
    return heads(shape, g), (), {}


def _swiglu(shape, g):
    return (randn(shape, g, shape.B, shape.T, 2 * shape.F),), (), {}


def _merge(shape, g):
    x, f = (randn(shape, g, shape.B, shape.T, shape.D) for _ in "xf")
    alpha = randn(shape, g, shape.D, dtype=torch.float32, std=0.1)
    beta = randn(shape, g, shape.D, dtype=torch.float32, mean=1.0, std=0.1)
    return (x, f, alpha, beta), (), {"segments": list(shape.segments)}


def _carried(shape, g):
    activations, _, kwargs = _merge(shape, g)
    acc = torch.promote_types(shape.dtype, torch.float32)
    return activations, (reference.segment_means(activations[0], shape.segments).to(acc),), kwargs


def _layerscale(shape, g):
    (x, f, _, scale), _, _ = _merge(shape, g)
    return (x, f, scale), (), {}


CASES = (
    Case(
        "rope",
        "RoPE (q, k)",
        _rope,
        lambda s: 4,
        lambda s: 4,
        call=one_by_one,
        part_of="rope_qk_norm",
    ),
    Case("qk_norm", "QK-Norm", _qk_norm, lambda s: 4, lambda s: 6, part_of="rope_qk_norm"),
    Case("rope_qk_norm", "RoPE + QK-Norm", _rope, lambda s: 4, lambda s: 6),
    Case("swiglu", "SwiGLU", _swiglu, lambda s: 3 * s.F / s.D, lambda s: 5 * s.F / s.D),
    Case("mvsplit_rmsnorm", "MV-Split + RMSNorm", _merge, lambda s: 3, lambda s: 5, per_block=2),
    Case(
        "mvsplit_rmsnorm_with_mean",
        "MV-Split + RMSNorm, carried mean",
        _carried,
        lambda s: 3,
        lambda s: 5,
        per_block=2,
        call=carried,
        profiled=False,
    ),
    Case(
        "residual_rmsnorm",
        "LayerScale + RMSNorm",
        _layerscale,
        lambda s: 3,
        lambda s: 5,
        per_block=2,
        profiled=False,
    ),
)
# arXiv 2605.06169: operators per optimizer step, eager and its fused kernels, 400 blocks on 8 H100.
PAPER_MS = {"eager": 1697.4, "fused": 614.0}

PROFILE = tuple(case for case in CASES if case.profiled)


def calls_per_step(case, blocks):
    """(forward, backward) calls of one optimizer step with three of four blocks checkpointed.

    A checkpointed block runs its forward again in backward: 400 blocks make 700 forward and 400
    backward calls.
    """
    recomputed = blocks * 3 // 4
    return (blocks + recomputed) * case.per_block, blocks * case.per_block
