"""A counter of the bytes and launches of operators, filled by the emulators of each backend."""

from dataclasses import dataclass

import torch


@dataclass
class Traffic:
    """Bytes read and written, and the launches (or PyTorch operations) that did it.

    tensors  bytes of the tensors that each launch was given, once: what memory must move when a
             cache serves all that a launch reads again
    """

    read: int = 0
    written: int = 0
    launches: int = 0
    tensors: int = 0

    def launched(self, *arguments):
        """A launch with these arguments; its loads and stores are added by who counts them."""
        self.launches += 1
        apart = {(t.data_ptr(), t.shape): t for t in tensors_in(arguments)}
        self.tensors += sum(map(stored_bytes, apart.values()))


def tensors_in(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def stored_bytes(t):
    """Of the elements that lie in memory: a dimension that is expanded counts once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= min(size, 1) if stride == 0 else size
    return elements * t.element_size()
