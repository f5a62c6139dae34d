"""Nested tensors of layout torch.jagged: samples of different lengths."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_values(op: str, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the values (1, all rows, ..) of nested tensors (B, *, ..) of one shape of samples.

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
