"""How many numbers a forward pass leaves behind for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Living(TorchDispatchMode):
    """The storages that operations have made, without those that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and (storage := each.untyped_storage())._cdata not in before:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes() / each.element_size()
        return out


def kept_numbers(forward: Callable[[], torch.Tensor]) -> float:
    """Numbers that are alive after `forward`, whose result is held, and were not before."""
    with _Living() as living:
        result = forward()
    count = sum(numbers for storage, numbers in living.made.values() if not storage.expired())
    assert result.requires_grad
    return count
