"""Tensors that a backward pass needs and that are cheap to make are made again, not kept.

An adapted layer keeps its input for the gradient of A. Where that input is what a norm, an activation or a gate gave,
theirs are kept for their own gradients anyway, and it can be made of them once more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

import torch
from torch.autograd.graph import saved_tensors_hooks

Make: TypeAlias = Callable[..., torch.Tensor]
"""Gives a tensor of the tensors that it is made of."""


@contextmanager
def made_again() -> Iterator[None]:
    """While it lasts, what `can_be_made` speaks of is kept by operations as what it is made of."""
    spoken_of: _Places = {}
    token = _SPOKEN_OF.set(spoken_of)
    try:
        with saved_tensors_hooks(lambda tensor: _packed(spoken_of, tensor), _unpacked):
            yield
    finally:
        _SPOKEN_OF.reset(token)


def can_be_made(tensor: torch.Tensor, make: Make, *of: torch.Tensor) -> torch.Tensor:
    """Says how a tensor is made, and gives it back; without `made_again` around it nothing follows.

    Args:
        tensor: Contiguous.
        make: Makes the same numbers, bit for bit, whenever it is asked.
        of: What it is made of, which other operations keep anyway.
    """
    spoken_of = _SPOKEN_OF.get()
    if spoken_of is not None and torch.is_grad_enabled() and tensor.requires_grad and tensor.is_contiguous():
        origin = _Origin(make, [_Whole(each.detach()) for each in of])
        spoken_of[_place(tensor)] = _Announced(weakref.ref(tensor), tensor._version, origin)
    return tensor


class _Whole:
    """A tensor as it is, which nobody may have changed since."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def unpacked(self) -> torch.Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor that the backward pass needs was changed in place: it is of shape "
                f"{list(self.tensor.shape)}, at version {self.tensor._version} instead of {self.version}"
            )
        return self.tensor


class _Origin:
    """What a tensor is made of. Made again it stays until all who asked for it to be kept have had it."""

    def __init__(self, make: Make, of: list[_Whole]) -> None:
        self.make, self.of = make, of
        self.asked = self.waiting = 0
        self.made: torch.Tensor | None = None

    def once_more(self) -> torch.Tensor:
        if self.made is None:
            self.waiting = self.asked
            with torch.no_grad():
                self.made = self.make(*(each.unpacked() for each in self.of))
        made = self.made
        self.waiting -= 1
        if self.waiting == 0:
            self.made = None
        return made


class _View:
    """A tensor that is made again, in one of its shapes."""

    def __init__(self, origin: _Origin, shape: torch.Size) -> None:
        self.origin, self.shape = origin, shape
        origin.asked += 1

    def unpacked(self) -> torch.Tensor:
        return self.origin.once_more().view(self.shape)


class _Announced:
    """A tensor of the forward pass, and what it is made of."""

    def __init__(self, tensor: weakref.ref[torch.Tensor], version: int, origin: _Origin) -> None:
        self.tensor, self.version, self.origin = tensor, version, origin

    def is_in(self, saved: torch.Tensor) -> bool:
        """Whether `saved`, which lies where it began, holds the same numbers in the same order."""
        tensor = self.tensor()
        return (
            tensor is not None
            and saved.is_contiguous()
            and (saved.numel(), saved.dtype, saved._version) == (tensor.numel(), tensor.dtype, self.version)
        )


_Kept: TypeAlias = _Whole | _View
_Places: TypeAlias = dict[tuple[int, int], _Announced]
_SPOKEN_OF: ContextVar[_Places | None] = ContextVar("spoken_of", default=None)


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Where in memory it begins."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _packed(spoken_of: _Places, tensor: torch.Tensor) -> _Kept:
    found = spoken_of.get(_place(tensor))
    return _View(found.origin, tensor.shape) if found is not None and found.is_in(tensor) else _Whole(tensor)


def _unpacked(kept: _Kept) -> torch.Tensor:
    return kept.unpacked()
