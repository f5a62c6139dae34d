"""Registration with torch.library, for every operator and every backend, in one place.

An operator is three registered ops:

    mvsplit::<op>       what users call; CompositeImplicitAutograd, so it is traced as the next two
    mvsplit::<op>_fwd   a kernel: the results, and the statistics that backward needs
    mvsplit::<op>_bwd   a kernel: the gradients

The last argument of a kernel op names the backend, so a call's choice is part of a compiled graph
and of its backward. `reference` has no kernel: it is plain PyTorch, differentiable any number of
times.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mvsplit_ops import _backends, _check

_LIB = torch.library.Library("mvsplit", "DEF")


@dataclass(frozen=True)
class Op:
    """One operator: its schemas, and what torch needs to know that a kernel cannot tell.

    fwd, bwd     schemas after the name; both end in `str backend`
    results      how many of fwd's outputs have a gradient; the rest are statistics
    activations  fwd's arguments that autocast casts (the first ones)
    reference    (*fwd inputs) -> results
    check        (*fwd inputs) -> None or ValueError
    fake_fwd     (*fwd inputs) -> empty outputs of fwd;  fake_bwd likewise
    save         (ctx, *fwd inputs, outputs) -> None
    backward     (ctx, bwd, *gradients of the results) -> a gradient or None for each fwd input
    """

    name: str
    fwd: str
    bwd: str
    results: int
    activations: int
    reference: Callable
    check: Callable
    fake_fwd: Callable
    fake_bwd: Callable
    save: Callable
    backward: Callable

    def __call__(self, *inputs, backend, outputs=None):
        """Run the operator on fwd's inputs; returns the results, or the first `outputs`."""
        count = outputs or self.results
        backend = _backends.resolve(self.name, backend, inputs[0])
        if backend == "reference":
            inputs = _cast_for_autocast(self, inputs, inputs[0].device.type)
            self.check(*inputs)
            return self.reference(*inputs)
        given = getattr(torch.ops.mvsplit, self.name + "_fwd")(*inputs, backend)
        if count == 1:
            return given if isinstance(given, torch.Tensor) else given[0]
        return given[:count]


def register(op):
    """Register the kernel ops of an operator; returns it."""
    fwd, bwd = f"{op.name}_fwd", f"{op.name}_bwd"
    _LIB.define(fwd + op.fwd)
    _LIB.define(bwd + op.bwd)

    def run_fwd(*args):
        op.check(*args[:-1])
        return _run(op.name, "_fwd", args)

    def run_bwd(*args):
        return _run(op.name, "_bwd", args)

    for key in ("CPU", "CUDA"):
        _LIB.impl(fwd, run_fwd, key)
        _LIB.impl(bwd, run_bwd, key)
    _register_fakes(op, fwd, bwd)
    _register_autograd(op, fwd, bwd)
    _register_autocast(op, fwd)
    return op


def expose(function, schema):
    """Register a public function under its name, mvsplit::<op>."""
    _LIB.define(function.__name__ + schema)
    _LIB.impl(function.__name__, function, "CompositeImplicitAutograd")


def recompute_cheap_ops():
    """The ops that selective activation checkpointing should recompute: memory-bound, no matmul.

    For torch.utils.checkpoint.create_selective_checkpoint_contexts, which sees the kernel ops.
    """
    return [getattr(torch.ops.mvsplit, f"{name}_fwd").default for name in _backends.OPS]


def _run(name, suffix, args):
    *inputs, backend = args
    return _backends.kernel(backend, name, suffix, inputs[0].device.type)(*inputs)


def _register_fakes(op, fwd, bwd):
    def fake_fwd(*args):
        op.check(*args[:-1])
        return op.fake_fwd(*args[:-1])

    torch.library.register_fake(f"mvsplit::{fwd}", fake_fwd, lib=_LIB)
    torch.library.register_fake(f"mvsplit::{bwd}", lambda *args: op.fake_bwd(*args[:-1]), lib=_LIB)


def _register_autograd(op, fwd, bwd):
    def save(ctx, inputs, output):
        outputs = (output,) if isinstance(output, torch.Tensor) else output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[op.results :])
        ctx.backend = inputs[-1]
        op.save(ctx, *inputs[:-1], outputs)

    def backward(ctx, *grads):
        grads = grads[: op.results]
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        kernel = getattr(torch.ops.mvsplit, bwd)
        # The engine casts a gradient to its parameter's dtype, so bwd may return the accumulator's.
        return (*op.backward(ctx, lambda *a: kernel(*a, ctx.backend), *grads), None)

    def save_nothing(ctx, inputs, output):
        pass

    def no_second_derivative(ctx, *grads):
        raise RuntimeError(
            f"{op.name}: its gradient has no kernel for a second derivative; "
            "pass backend='reference' to differentiate twice"
        )

    for name, *rules in ((fwd, save, backward), (bwd, save_nothing, no_second_derivative)):
        _LIB.impl(name, _autograd_kernel(name, *rules), "Autograd", with_keyset=True)


def _autograd_kernel(name, save, backward):
    """What torch.library.register_autograd installs, without 30 us a call.

    That spends most of its time looking for arguments that were left at their defaults; kernel ops
    have no defaults. save(ctx, inputs, output) and backward(ctx, *gradients) are its two functions.
    """
    kernel = getattr(torch.ops.mvsplit, name).default

    def below_autograd(keyset, args):
        with torch._C._AutoDispatchBelowAutograd():
            return kernel.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            *inputs, keyset = args
            output = below_autograd(keyset, inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return (*backward(ctx, *grads), None)

    Function.__name__ = f"mvsplit_{name}"

    def run(keyset, *args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Function.apply(*args, keyset)
        return below_autograd(keyset, args)

    return run


def _cast_for_autocast(op, inputs, device):
    """Under autocast, activations take its dtype; parameters and tables keep theirs."""
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return inputs
    dtype, n = torch.get_autocast_dtype(device), op.activations

    def cast(t):
        return t if t.dtype not in _check.ACTIVATIONS or t.dtype == torch.float64 else t.to(dtype)

    return (*map(cast, inputs[:n]), *inputs[n:])


def _register_autocast(op, fwd):
    def autocast(device_type):
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type}"))
        kernel = getattr(torch.ops.mvsplit, fwd)

        def run(*args):
            args = _cast_for_autocast(op, args, device_type.lower())
            with torch._C._ExcludeDispatchKeyGuard(key):
                return kernel(*args)

        return run

    for device_type in ("CPU", "CUDA"):
        _LIB.impl(fwd, autocast(device_type), f"Autocast{device_type}")
