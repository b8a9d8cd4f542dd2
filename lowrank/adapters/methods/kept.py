"""A value that was made of tensors, kept for as long as these are the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lowrank.ops.parts import parts_of

_LOOKED_AT = 4096


class Kept:
    """A value and what it was made of.

    That a tensor has changed is seen by its address, its dtype and its version counter. Writes through `.data` leave no
    trace there: on a CPU a few thousand of its numbers, spread over its rows and columns, are compared too (elsewhere
    that would have the host wait for the device).

    Args:
        value: What is kept.
        parts: The tensors that it was made of.
        scale: A number that it was made with.
    """

    def __init__(self, value: torch.Tensor, parts: Sequence[torch.Tensor], scale: float = 1.0) -> None:
        self.value = value
        parts = _ordinary(parts)
        self._made_of = (scale, [_identity(part) for part in parts])
        self._numbers = [_some(part).clone() for part in parts]

    def of(self, parts: Sequence[torch.Tensor], scale: float = 1.0) -> bool:
        """Whether it was made of these."""
        parts = _ordinary(parts)
        if self._made_of != (scale, [_identity(part) for part in parts]):
            return False
        return all(torch.equal(kept, _some(part)) for kept, part in zip(self._numbers, parts, strict=True))


def _ordinary(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [part for tensor in tensors for part in parts_of(tensor)]


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """An inference tensor does not count its changes: it is new each time."""
    version = object() if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.device, tensor.dtype


def _some(tensor: torch.Tensor) -> torch.Tensor:
    """Two numbers a row or fewer, a step apart that has no divisor in common with the rows' length."""
    flat = tensor.detach().flatten()
    if tensor.device.type != "cpu":
        return flat[:0]
    step = max(1, tensor.shape[-1] // 2, len(flat) // _LOOKED_AT)
    while math.gcd(step, tensor.shape[-1]) > 1:
        step += 1
    return flat[::step]
