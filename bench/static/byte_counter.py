"""Counters of the bytes that kernels and eager operations move."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that move nothing, in addition to those whose schema says that they return a view.
FREE_OPERATIONS = "empty", "new_empty", "detach", "_unsafe_view", "promote_types"


@dataclass
class ByteCounter:
    """Bytes read and written, and the number of launches (or PyTorch operations) that did it.

    tensors  bytes of the tensors passed to each launch, each tensor once: what memory must move if
             a cache serves everything that a launch reads again
    """

    read: int = 0
    written: int = 0
    launches: int = 0
    tensors: int = 0

    def count_launch(self, *arguments: Any) -> None:
        """Add a launch and its tensors; the caller adds the bytes that it loads and stores."""
        self.launches += 1
        distinct = {(t.data_ptr(), t.shape): t for t in tensors_in(arguments)}
        self.tensors += sum(map(stored_bytes, distinct.values()))

    def count_call(self, arguments: Any, results: Any) -> None:
        """Add a call that reads every tensor argument and writes every result once."""
        self.count_launch(arguments, results)
        self.read += sum(map(stored_bytes, tensors_in(arguments)))
        self.written += sum(map(stored_bytes, tensors_in(results)))


class EagerCounter(TorchDispatchMode):
    """Adds the tensors of every PyTorch operation to a counter; views and allocations are free."""

    def __init__(self, counter: ByteCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if not func.is_view and not func.__name__.startswith(FREE_OPERATIONS):
            self.counter.count_call((args, kwargs), results)
        return results


def tensors_in(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def stored_bytes(t: Tensor) -> int:
    """Return the bytes of the elements in memory: an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= min(size, 1) if stride == 0 else size
    return elements * t.element_size()
