"""Registration of every operator with torch.library, for all backends.

An operator is three registered ops:

    mvsplit::<op>       what users call; CompositeImplicitAutograd, so it is traced as the next two
    mvsplit::<op>_fwd   a kernel op: the results, and the statistics that backward needs
    mvsplit::<op>_bwd   a kernel op: the gradients

The last argument of a kernel op names the backend, so the choice of a call is part of a compiled
graph and of its backward. `reference` has no kernel: it is plain PyTorch, differentiable any number
of times.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.overrides import handle_torch_function, has_torch_function

from mvsplit_ops import _backends, _batching, _check

P = ParamSpec("P")
R = TypeVar("R")

_LIB = torch.library.Library("mvsplit", "DEF")
_forward_ops: dict[str, torch._ops.OpOverload] = {}  # a lookup in torch.ops takes 0.5 us


class Context(Protocol):
    """The ctx of autograd, with what the operators store in it."""

    needs_input_grad: tuple[bool, ...]
    backend: str
    modes: tuple[bool, ...]  # rope, rope_qk_norm
    segments: list[int]  # mvsplit_rmsnorm

    @property
    def saved_tensors(self) -> tuple[Any, ...]: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...

    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...


Gradients = tuple[Tensor | None, ...]
Kernel = Callable[..., Any]  # <op>_bwd: a gradient, or several


@dataclass(frozen=True)
class Op:
    """One operator: its schemas, and the functions with which torch.library registers it.

    fwd, bwd     schemas after the name; both end in `str backend`
    results      number of outputs of fwd that have a gradient; the rest are statistics
    activations  number of arguments of fwd that autocast casts (the first ones)
    reference    (*fwd inputs) -> results
    check        (*fwd inputs) -> None or ValueError
    fake_fwd     (*fwd inputs) -> empty outputs of fwd;  fake_bwd likewise
    save         (ctx, *fwd inputs, outputs) -> None
    backward     (ctx, bwd, *gradients of the results) -> a gradient or None for each fwd input
    rowwise      whether the rows (the last dimension) of activations are independent of each other
    """

    name: str
    fwd: str
    bwd: str
    results: int
    activations: int
    reference: Callable[..., Any]
    check: Callable[..., None]
    fake_fwd: Callable[..., Tensor | tuple[Tensor, ...]]
    fake_bwd: Callable[..., Tensor | tuple[Tensor, ...]]
    save: Callable[..., None]
    backward: Callable[..., Gradients]
    rowwise: bool = False

    def __call__(self, *inputs: Any, backend: str | None, outputs: int | None = None) -> Any:
        """Run the operator on the inputs of fwd; return the results, or the first `outputs`."""
        count = outputs or self.results
        backend = _backends.resolve(self.name, backend, inputs[0])
        if inputs[0].is_nested:
            return self._run_on_jagged(inputs, backend)
        if backend == "reference":
            inputs = _cast_for_autocast(self, inputs, inputs[0].device.type)
            self.check(*inputs)
            return self.reference(*inputs)
        results = _forward_ops[self.name](*inputs, backend)
        if count == 1:
            return results if isinstance(results, Tensor) else results[0]
        return results[:count]

    def _run_on_jagged(self, inputs: tuple[Any, ...], backend: str) -> Any:
        """Run the operator on the values of nested tensors, as one sample."""
        if not self.rowwise:
            raise ValueError(
                f"{self.name}: nested tensors are not supported, because a token depends on its "
                "position or on other tokens; pad them with torch.nested.to_padded_tensor"
            )
        count = self.activations
        values = _batching.to_values(self.name, inputs[:count])
        results = self(*values, *inputs[count:], backend=backend)
        if isinstance(results, Tensor):
            return _batching.to_nested(results, inputs[0])
        pairs = zip(results, inputs[:count], strict=True)
        return tuple(_batching.to_nested(t, like) for t, like in pairs)


def register(op: Op) -> Op:
    """Register the kernel ops of an operator, and return it."""
    fwd, bwd = f"{op.name}_fwd", f"{op.name}_bwd"
    _LIB.define(fwd + op.fwd)
    _LIB.define(bwd + op.bwd)

    def run_fwd(*args: Any) -> Any:
        op.check(*args[:-1])
        return _run_kernel(op.name, "_fwd", args)

    def run_bwd(*args: Any) -> Any:
        return _run_kernel(op.name, "_bwd", args)

    _forward_ops[op.name] = getattr(torch.ops.mvsplit, fwd).default
    for key in ("CPU", "CUDA"):
        _LIB.impl(fwd, run_fwd, key)
        _LIB.impl(bwd, run_bwd, key)
    _refuse_layouts(op, fwd)
    _register_fakes(op, fwd, bwd)
    _register_autograd(op, fwd, bwd)
    _register_autocast(op, fwd)
    for name, schema in ((fwd, op.fwd), (bwd, op.bwd)):
        kernel = getattr(torch.ops.mvsplit, name)
        rule = _batching.make_rule(kernel, schema, prepend=op.name == "swiglu")
        torch.library.register_vmap(f"mvsplit::{name}", rule, lib=_LIB)
    return op


def expose(schema: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a public function under its name, mvsplit::<op>, as torch.library and fx expect.

    Tensor-like arguments that override functions of torch (__torch_function__), such as the proxies
    of torch.fx and subclasses of Tensor, handle the call as they handle PyTorch's own functions.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if has_torch_function(args) or (kwargs and has_torch_function((*kwargs.values(),))):
                overriding = (*args, *kwargs.values())
                return handle_torch_function(call, overriding, *args, **kwargs)
            return function(*args, **kwargs)

        _LIB.define(function.__name__ + schema)
        _LIB.impl(function.__name__, function, "CompositeImplicitAutograd")
        return call

    return decorate


def recompute_cheap_ops() -> list[torch._ops.OpOverload]:
    """Return the ops that selective activation checkpointing should recompute.

    They are the forward kernel ops of all operators: bound by memory, without a matrix product.

        cheap = mv.recompute_cheap_ops()
        def policy(ctx, op, *args, **kwargs):
            return CheckpointPolicy.PREFER_RECOMPUTE if op in cheap else CheckpointPolicy.MUST_SAVE

    For torch.utils.checkpoint.create_selective_checkpoint_contexts.
    """
    return [getattr(torch.ops.mvsplit, f"{name}_fwd").default for name in _backends.OPS]


def _run_kernel(name: str, suffix: str, args: tuple[Any, ...]) -> Any:
    *inputs, backend = args
    device_type = "cpu" if inputs[0].is_cpu else inputs[0].device.type
    return _backends.load_kernel(backend, name, suffix, device_type)(*inputs)


def _refuse_layouts(op: Op, fwd: str) -> None:
    """Register kernels that raise a clear error for tensors that no kernel takes."""

    def make_kernel(kind: str, remedy: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            raise ValueError(f"{op.name}: {kind} tensors are not supported; call {remedy} first")

        return run

    for device in ("CPU", "CUDA"):
        for key, kind, remedy in (
            ("Quantized", "quantised", ".dequantize()"),
            ("Sparse", "sparse", ".to_dense()"),
            ("SparseCsr", "sparse", ".to_dense()"),
        ):
            _LIB.impl(fwd, make_kernel(kind, remedy), key + device)
    _LIB.impl(fwd, make_kernel("MKL-DNN", ".to_dense()"), "MkldnnCPU")


def _register_fakes(op: Op, fwd: str, bwd: str) -> None:
    def fake_fwd(*args: Any) -> Any:
        op.check(*args[:-1])
        return op.fake_fwd(*args[:-1])

    torch.library.register_fake(f"mvsplit::{fwd}", fake_fwd, lib=_LIB)
    torch.library.register_fake(f"mvsplit::{bwd}", lambda *args: op.fake_bwd(*args[:-1]), lib=_LIB)


def _register_autograd(op: Op, fwd: str, bwd: str) -> None:
    def save(ctx: Context, inputs: Sequence[Any], output: Tensor | tuple[Tensor, ...]) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[op.results :])
        ctx.backend = inputs[-1]
        op.save(ctx, *inputs[:-1], outputs)

    def backward(ctx: Context, *grads: Tensor | None) -> Gradients:
        grads = grads[: op.results]
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        kernel = getattr(torch.ops.mvsplit, bwd)
        # Autograd casts a gradient to the dtype of its parameter, so bwd may return accumulators.
        return (*op.backward(ctx, lambda *a: kernel(*a, ctx.backend), *grads), None)

    def save_nothing(ctx: Context, inputs: Sequence[Any], output: Any) -> None:
        pass

    def refuse_second_derivative(ctx: Context, *grads: Tensor | None) -> Gradients:
        raise RuntimeError(
            f"{op.name}: its gradient has no kernel for a second derivative; "
            "pass backend='reference' to differentiate twice"
        )

    for name, kernel in (
        (fwd, _autograd_kernel(op, fwd, save, backward)),
        (bwd, _autograd_kernel(op, bwd, save_nothing, refuse_second_derivative)),
    ):
        _LIB.impl(name, kernel, "Autograd", with_keyset=True)


def _autograd_kernel(
    op: Op, name: str, save: Callable[..., None], backward: Callable[..., Gradients]
) -> Callable[..., Any]:
    """Return what torch.library.register_autograd would install, but 30 us faster per call.

    register_autograd spends most of its time looking for arguments that were left at their
    defaults, and kernel ops have no defaults. Its kernels also fail under the transforms of
    torch.func, and drop the tangents of forward-mode derivatives. It takes the same two functions:
    save(ctx, inputs, output) and backward(ctx, *gradients).
    """
    kernel = getattr(torch.ops.mvsplit, name).default

    def run_below_autograd(keyset: torch._C.DispatchKeySet, args: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return kernel.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Function(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args
            if torch._C._are_functorch_transforms_active():
                # A Function turns both off, but an outer transform may need the derivative.
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    output = run_below_autograd(keyset, inputs)
            else:
                output = run_below_autograd(keyset, inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Gradients:
            return (*backward(ctx, *grads), None)

    Function.__name__ = f"mvsplit_{name}"
    apply = Function.apply  # type: ignore[attr-defined]

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return run_below_autograd(keyset, args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return apply(*args, keyset)
        return apply(*args, keyset)

    return run


def _refuse_tangents(op: Op, args: Sequence[Any]) -> None:
    """Raise RuntimeError if an argument is a dual tensor of forward-mode differentiation."""
    for t in args:
        if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise RuntimeError(
                f"{op.name}: no kernel computes forward-mode derivatives (jvp, jacfwd, hessian); "
                "pass backend='reference'"
            )


def _cast_for_autocast(op: Op, inputs: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """Return the inputs as autocast wants them: activations cast, parameters and tables not."""
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return inputs
    dtype, n = torch.get_autocast_dtype(device), op.activations

    def cast(t: Tensor | None) -> Tensor | None:
        if t is None or t.dtype not in _check.ACTIVATIONS or t.dtype == torch.float64:
            return t
        return t.to(dtype)

    return (*map(cast, inputs[:n]), *inputs[n:])


def _register_autocast(op: Op, fwd: str) -> None:
    def make_kernel(device_type: str) -> Callable[..., Any]:
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type}"))
        kernel = getattr(torch.ops.mvsplit, fwd)

        def run(*args: Any) -> Any:
            args = _cast_for_autocast(op, args, device_type.lower())
            with torch._C._ExcludeDispatchKeyGuard(key):
                return kernel(*args)

        return run

    for device_type in ("CPU", "CUDA"):
        _LIB.impl(fwd, make_kernel(device_type), f"Autocast{device_type}")
