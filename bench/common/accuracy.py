"""The accuracy rule, applied by the tests and before every timing."""

import functools
from typing import cast

import torch
from torch import Tensor

from bench.cases import Case, Function, Inputs, Kwargs, Results, Tensors, generator_on
from bench.common.timing import CallPair


class Inaccurate(AssertionError):
    """The error of an implementation is larger than the rule allows."""


def require_accurate(
    name: str, got: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0
) -> None:
    """Raise Inaccurate if the error exceeds `factor` times that of eager code plus one rounding.

    exact is float64; the rounding is that of its largest value in the dtype of `got`. This is the
    rule of FlashAttention's tests: no tolerance is picked by hand.
    """
    if got.shape != exact.shape:
        raise Inaccurate(f"{name}: expected shape {tuple(exact.shape)}, got {tuple(got.shape)}")
    if not torch.isfinite(got).all():
        raise Inaccurate(f"{name}: contains NaN or infinity")
    if exact.numel() == 0:
        return
    error, budget = ((t.double() - exact).abs().max().item() for t in (got, eager))
    rounding = torch.finfo(got.dtype).eps * exact.abs().max().item()
    if not error <= factor * budget + rounding:
        raise Inaccurate(
            f"{name}: largest error {error:.2e}, eager in {got.dtype} {budget:.2e}, "
            f"allowed {factor:g} times that and {rounding:.1e}"
        )


def results_and_gradients(
    function: Function, activations: Tensors, constants: Tensors, kwargs: Kwargs
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the results of a call and the gradients of its activations.

    The cotangents are the same in every dtype.
    """
    leaves = [t.detach().requires_grad_() for t in activations]
    outputs = function(leaves, constants, kwargs)
    torch.autograd.backward(outputs, make_cotangents(outputs, seed=0))
    return [t.detach() for t in outputs], cast("list[Tensor]", [t.grad for t in leaves])


def cotangent(t: Tensor, generator: torch.Generator) -> Tensor:
    """Return random numbers strided as t, and exact in bfloat16: every dtype gets the same."""
    values = torch.randn(t.shape, generator=generator, device=generator.device).bfloat16()
    return torch.empty_like(t).copy_(values)


def make_cotangents(outputs: Results, seed: int = 1) -> list[Tensor]:
    """Return a cotangent for each result of a call."""
    generator = generator_on(outputs[0].device, seed)
    return [cotangent(t, generator) for t in outputs]


def forward_backward(
    function: Function, activations: Tensors, constants: Tensors, kwargs: Kwargs
) -> CallPair:
    """Return the (forward, backward) calls of an implementation that are timed."""
    leaves = [t.detach().requires_grad_() for t in activations]
    with torch.no_grad():
        cotangents = make_cotangents(function(activations, constants, kwargs))
    forward = functools.partial(function, leaves, constants, kwargs)
    return forward, lambda outputs: torch.autograd.grad(outputs, leaves, cotangents)


def double(inputs: Inputs) -> Inputs:
    """Return the inputs in float64, for the exact results."""
    activations, constants, kwargs = inputs
    return [t.double() for t in activations], [t.double() for t in constants], kwargs


class Judge:
    """The accuracy rule for the inputs of one case; exact and eager results are computed once.

    The eager code is mvsplit_ops.reference: it computes 16-bit inputs in float32 and rounds once.
    A peer, and eager code under torch.compile, may err as plain eager code does, which rounds the
    result of every operation.

    samples  inputs of one shape, whose errors are judged together: the rule compares largest
             errors, which depend on chance among the few elements of a narrow parameter
    """

    def __init__(self, case: Case, *samples: Inputs) -> None:
        self.case, self.samples = case, samples
        self.exact = [results_and_gradients(case.reference, *double(inputs)) for inputs in samples]
        self.eager = [results_and_gradients(case.reference, *inputs) for inputs in samples]

    @functools.cached_property
    def plain(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        return [results_and_gradients(self.case.eager, *inputs) for inputs in self.samples]

    def require(self, name: str, function: Function, peer: bool = False) -> None:
        """Raise Inaccurate unless results and gradients of `function` obey the rule.

        peer: compare with the error of plain eager code
        """
        eager_runs = self.plain if peer else self.eager
        runs = [results_and_gradients(function, *inputs) for inputs in self.samples]
        for kind, kind_name in enumerate(("result", "gradient")):
            for i in range(len(self.exact[0][kind])):
                got, eager, exact = (
                    torch.stack([run[kind][i] for run in pooled])
                    for pooled in (runs, eager_runs, self.exact)
                )
                require_accurate(f"{self.case.op}, {name}, {kind_name} {i}", got, eager, exact)


def require_case(
    case: Case, name: str, function: Function, *samples: Inputs, peer: bool = False
) -> None:
    """Raise Inaccurate unless a function obeys the rule; see Judge."""
    Judge(case, *samples).require(name, function, peer)
