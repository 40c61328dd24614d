"""Counts the bytes of tensors that are alive, operation by operation: what thor/plan.py calculates, measured.

It sees storages, also those that FSDP2 empties and fills again, on a CPU or of fake tensors, which have shapes and no
memory, so that a 7B step can be measured anywhere. It does not see what an operation allocates and frees inside.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """`now` and `peak` of the bytes in tensors that were given to `watch` or made under this mode, and still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages = WeakIdKeyDictionary()

    @property
    def now(self) -> int:
        """Bytes alive."""
        return sum(storage.nbytes() for storage in self._storages.keys())

    def watch(self, tensors: object) -> None:
        """Count these, too."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self._storages[tensor.untyped_storage()] = True
        self.peak = max(self.peak, self.now)

    def restart(self) -> int:
        """Forget the peak; returns the bytes alive."""
        self.peak = self.now
        return self.peak

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        self.watch(result)
        return result
