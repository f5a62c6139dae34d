"""Runs of an operator on inputs of any value, and their comparison with exact results."""

import torch

from bench.common.accuracy import require_accurate, starts_from_result
from mvsplit_ops import _C, reference


def each_instruction_set(backend):
    """Set every instruction set of the cpu backend in turn; yield its name, or the backend's."""
    if backend != "cpu":
        yield backend
        return
    before = _C.capability()
    try:
        for name in _C.capabilities():
            _C.set_capability(name)
            yield name
    finally:
        _C.set_capability(before)


def run(function, leaves, constants, cotangents):
    """Return {name: tensor}: the results of function(**leaves, **constants), and gradients.

    cotangents  one for each result, or none for results only
    """
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    outputs = function(**leaves, **constants)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    results = {f"result {i}": t.detach() for i, t in enumerate(outputs)}
    if cotangents:
        grads = torch.autograd.grad(outputs, [*leaves.values()], cotangents)
        results |= {f"d{name}": t for name, t in zip(leaves, grads, strict=True)}
    return results


def run_exact_and_eager(op, leaves, constants, cotangents):
    """Return what `run` returns for the definition of an operator, in float64 and in the dtype.

    The second is, element by element, the worse of two kinds of eager code, if the accuracy rule
    allows a backward that starts from the rounded result.
    """
    definition = getattr(reference, op)
    wide = [double(tensors) for tensors in (leaves, constants)]
    exact = run(definition, *wide, [t.double() for t in cotangents])
    eager = run(definition, leaves, constants, cotangents)
    if op != "mvsplit_rmsnorm" or "weight" in leaves:
        return exact, eager

    def from_result(**arguments):
        def call(activations, constants, kwargs):
            return definition(**kwargs)

        return starts_from_result(call)([arguments["x"]], (), arguments)

    other = run(from_result, leaves, constants, cotangents)
    errors = {name: [(t[name] - exact[name]).abs() for t in (eager, other)] for name in eager}
    worse = {name: second > first for name, (first, second) in errors.items()}
    return exact, {name: torch.where(worse[name], other[name], t) for name, t in eager.items()}


def double(arguments):
    """Return the arguments with every tensor in float64."""
    return {k: t.double() if isinstance(t, torch.Tensor) else t for k, t in arguments.items()}


def require_all_accurate(label, got, eager, exact):
    """Apply the accuracy rule to each of the results and gradients that `run` returned."""
    assert got.keys() == eager.keys() == exact.keys()
    for name in got:
        require_accurate(f"{label}, {name}", got[name], eager[name], exact[name])
