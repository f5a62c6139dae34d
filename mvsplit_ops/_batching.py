"""Batches of calls (torch.func.vmap) and nested tensors, whose samples have different lengths."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

PARAMETERS = {"alpha", "beta", "weight", "scale", "q_weight", "k_weight"}
TABLES = {"cos", "sin"}

Outputs = tuple[Any, Any]  # results, and the dimension of each over which it is batched


def make_rule(kernel: Callable[..., Any], schema: str, prepend: bool) -> Callable[..., Outputs]:
    """Return the batching rule of a kernel op for torch.func.vmap.

    A batch of calls is one call with a larger B, unless a parameter or table differs from call to
    call or the gradient of a parameter is wanted for each call: then the kernel runs once per call.

    schema   as in torch.library; a gradient of a parameter is the sum over the samples
    prepend  whether activations may have further dimensions in front, so that B need not grow
    """
    arguments, _ = schema.split("->")
    names = re.findall(r"(\w+)[,)]", arguments)
    sums_samples = "Tensor d" in arguments  # a backward op: dy, or dq and dk

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Outputs:
        mapped = {n for n, d in zip(names, in_dims, strict=True) if isinstance(d, int)}
        present = {n for n, a in zip(names, args, strict=True) if isinstance(a, Tensor)}
        if mapped & (PARAMETERS | TABLES) or (sums_samples and present & PARAMETERS):
            return _run_one_by_one(kernel, info.batch_size, in_dims, args)
        folded = [
            a if n in PARAMETERS else _fold(a, d, info.batch_size, n in TABLES, prepend)
            for n, a, d in zip(names, args, in_dims, strict=True)
        ]
        return _unfold(kernel(*folded), info.batch_size, prepend)

    return rule


def _fold(arg: Any, dim: int | None, count: int, is_table: bool, prepend: bool) -> Any:
    """Return an argument of `count` calls: (count * B, ..), or (count, ..) with `prepend`."""
    if not isinstance(arg, Tensor):
        return arg
    if is_table and (arg.dim() == 2 or arg.shape[0] == 1):
        return arg  # the same for every sample
    calls = arg.expand(count, *arg.shape) if dim is None else arg.movedim(dim, 0)
    return calls if prepend else calls.flatten(0, 1)


def _unfold(results: Any, count: int, prepend: bool) -> Outputs:
    def unfold(t: Tensor) -> tuple[Tensor, int | None]:
        if t.dim() == 1 and t.numel() == 0:  # stands for a result that does not exist
            return t, None
        samples = t.shape[0] // max(count, 1)
        return (t if prepend else t.unflatten(0, (count, samples))), 0

    if isinstance(results, Tensor):
        return unfold(results)
    tensors, dims = zip(*map(unfold, results), strict=True)
    return tensors, dims


def _run_one_by_one(
    kernel: Callable[..., Any], count: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> Outputs:
    def pick(arg: Any, dim: Any, i: int) -> Any:
        return arg.select(dim, i) if isinstance(dim, int) else arg

    if count == 0:
        raise ValueError("mvsplit_ops: vmap over no calls at all; the batch must not be empty")
    calls = [
        kernel(*(pick(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(count)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])


def to_values(op: str, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the values (1, all rows, ..) of jagged tensors (B, *, ..) with the same samples.

    ValueError: another layout, a dense tensor among them, or samples of other lengths.
    """
    first = tensors[0]
    for t in tensors:
        if t is None:
            continue
        if not t.is_nested or t.layout != torch.jagged or not isinstance(t.shape[1], torch.SymInt):
            raise ValueError(
                f"{op}: nested tensors must all have layout torch.jagged and shape (B, *, ..), got "
                f"{t.layout}; use torch.nested.nested_tensor(.., layout=torch.jagged)"
            )
        if t.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"{op}: nested tensors must have the same offsets, got shapes "
                f"{tuple(first.shape)} and {tuple(t.shape)}; "
                "use torch.nested.nested_tensor_from_jagged(values, offsets) with one `offsets`"
            )
    return [None if t is None else t.values().unsqueeze(0) for t in tensors]


def to_nested(values: Tensor, like: Tensor) -> Tensor:
    """Return values (1, all rows, ..) as a nested tensor with the samples of `like`."""
    offsets, lengths = like.offsets(), like.lengths()  # type: ignore[attr-defined]
    return torch.nested.nested_tensor_from_jagged(values.squeeze(0), offsets, lengths)
