"""Is a result right? The one rule, used by the tests and before anything is timed."""

import torch

from bench.cases import generator_on


class Inaccurate(AssertionError):
    """A kernel erred more than the rule allows."""


def require_accurate(name, got, eager, exact, factor=2.0):
    """`got` may be `factor` times as wrong as eager code in its dtype, plus one rounding.

    exact is float64; the rounding is of its largest value. Restates the rule of FlashAttention's
    tests: no tolerance is picked by hand.
    """
    if got.shape != exact.shape or not torch.isfinite(got).all():
        raise Inaccurate(f"{name}: shape {tuple(got.shape)}, or a value that is not finite")
    if exact.numel() == 0:
        return
    error, budget = ((t.double() - exact).abs().max().item() for t in (got, eager))
    rounding = torch.finfo(got.dtype).eps * exact.abs().max().item()
    if not error <= factor * budget + rounding:
        raise Inaccurate(
            f"{name}: largest error {error:.2e}, eager in {got.dtype} {budget:.2e}, "
            f"allowed {factor:g} times that and {rounding:.1e}"
        )


def results_and_gradients(function, activations, constants, kwargs, seed=0):
    """Results of a call, and gradients of its activations for cotangents that no dtype changes."""
    leaves = [t.detach().requires_grad_() for t in activations]
    outputs = function(leaves, constants, kwargs)
    generator = generator_on(outputs[0].device, seed)
    cotangents = [cotangent(t, generator) for t in outputs]
    torch.autograd.backward(outputs, cotangents)
    return [t.detach() for t in outputs], [t.grad for t in leaves]


def cotangent(t, generator):
    """Random, strided as t, and exact in bfloat16, so that every dtype is given the same one."""
    values = torch.randn(t.shape, generator=generator, device=generator.device).bfloat16()
    return torch.empty_like(t).copy_(values)


def cotangents_of(function, activations, constants, kwargs, seed=1):
    """A cotangent for each result of a call."""
    with torch.no_grad():
        outputs = function(activations, constants, kwargs)
    generator = generator_on(outputs[0].device, seed)
    return [cotangent(t, generator) for t in outputs]


def forward_backward(function, activations, constants, kwargs):
    """(forward, backward) of an implementation on its inputs: what is timed, and checked first."""
    leaves = [t.detach().requires_grad_() for t in activations]
    cotangents = cotangents_of(function, activations, constants, kwargs)

    def forward():
        return function(leaves, constants, kwargs)

    def backward(outputs):
        return torch.autograd.grad(outputs, leaves, cotangents)

    return forward, backward


def double(inputs):
    """The same inputs in float64: what the oracle is given."""
    activations, constants, kwargs = inputs
    return [t.double() for t in activations], [t.double() for t in constants], kwargs


class Judge:
    """The rule for one case's inputs: what is exact, and what eager code errs, computed once.

    samples  inputs of one shape, whose errors are judged together: the rule compares largest
             errors, and among the few elements of a narrow parameter one sample's are luck
    """

    def __init__(self, case, *samples):
        self.case, self.samples = case, samples
        self.exact = [results_and_gradients(case.reference, *double(inputs)) for inputs in samples]
        self.eager = [results_and_gradients(case.reference, *inputs) for inputs in samples]

    def require(self, name, function):
        """Results and gradients of `function` obey the rule; else Inaccurate."""
        got = [results_and_gradients(function, *inputs) for inputs in self.samples]
        for kind, what in enumerate(("result", "gradient")):
            for i in range(len(self.exact[0][kind])):
                pooled = (
                    torch.stack([run[kind][i] for run in runs])
                    for runs in (got, self.eager, self.exact)
                )
                require_accurate(f"{self.case.op}, {name}, {what} {i}", *pooled)


def require_case(case, name, function, *samples):
    """One function judged: see Judge."""
    Judge(case, *samples).require(name, function)
