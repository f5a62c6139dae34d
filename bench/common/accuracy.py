"""The accuracy rule, applied by the tests and before every timing."""

import functools
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from bench.cases import Case, Function, Inputs, Kwargs, Results, Tensors, generator_on
from bench.common.timing import CallPair
from mvsplit_ops import reference


class Inaccurate(AssertionError):
    """The error of an implementation is larger than the rule allows."""


def largest_error(t: Tensor, exact: Tensor) -> float:
    return (t.double() - exact).abs().max().item() if t.numel() else 0.0


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
    error, budget = largest_error(got, exact), largest_error(eager, exact)
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


class _NormFromResult(torch.autograd.Function):
    """RMSNorm without a weight, whose backward starts from the result as it is stored.

    n = y in the dtype of the activations, dz = rstd * (dy - n * mean(dy * n))
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, eps: float, stored: torch.dtype) -> Tensor:
        rstd = torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward((z * rstd).to(stored), rstd)
        return z * rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        n, rstd = ctx.saved_tensors
        n = n.to(dy.dtype)
        return rstd * (dy - n * (dy * n).mean(-1, keepdim=True)), None, None


def starts_from_result(function: Function) -> Function:
    """Return a definition of a merge whose backward reads the rounded result, as kernels do.

    The result is what the next layer keeps anyway, so a backward that reads it moves no more bytes
    and needs no more memory. Its rounding shows in gradients of float32 gains.
    """

    def call(activations: Tensors, constants: Tensors, kwargs: Kwargs) -> Results:
        def norm(z: Tensor, weight: Tensor | None, eps: float) -> Tensor:
            if weight is not None:
                return definition(z, weight, eps)
            return cast("Tensor", _NormFromResult.apply(z, eps, activations[0].dtype))

        definition = reference.rms_norm
        with mock.patch.object(reference, "rms_norm", norm):
            return function(activations, constants, kwargs)

    return call


class Judge:
    """The accuracy rule for the inputs of one case; exact and eager results are computed once.

    The eager code is mvsplit_ops.reference: it computes 16-bit inputs in float32 and rounds once.
    A backward of mvsplit_rmsnorm may start from the rounded result (starts_from_result). A peer,
    and eager code under torch.compile, may err as plain eager code does, which rounds the result of
    every operation.

    samples  inputs of one shape, whose errors are judged together: the rule compares largest
             errors, which depend on chance among the few elements of a narrow parameter
    """

    def __init__(self, case: Case, *samples: Inputs) -> None:
        self.case, self.samples = case, samples
        self.exact = [results_and_gradients(case.reference, *double(inputs)) for inputs in samples]
        self.eager = [self._run(case.reference)]
        if case.op.startswith("mvsplit_rmsnorm"):
            self.eager.append(self._run(starts_from_result(case.reference)))

    def _run(self, function: Function) -> list[tuple[list[Tensor], list[Tensor]]]:
        return [results_and_gradients(function, *inputs) for inputs in self.samples]

    @functools.cached_property
    def plain(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        return self._run(self.case.eager)

    def require(self, name: str, function: Function, peer: bool = False) -> None:
        """Raise Inaccurate unless results and gradients of `function` obey the rule.

        peer: compare with the error of plain eager code
        """
        runs = self._run(function)
        for kind, kind_name in enumerate(("result", "gradient")):
            for i in range(len(self.exact[0][kind])):
                got, exact, *eager = (
                    torch.stack([run[kind][i] for run in pooled])
                    for pooled in (runs, self.exact, *([self.plain] if peer else self.eager))
                )
                allowed = max(eager, key=functools.partial(largest_error, exact=exact))
                require_accurate(f"{self.case.op}, {name}, {kind_name} {i}", got, allowed, exact)


def require_case(
    case: Case, name: str, function: Function, *samples: Inputs, peer: bool = False
) -> None:
    """Raise Inaccurate unless a function obeys the rule; see Judge."""
    Judge(case, *samples).require(name, function, peer)
