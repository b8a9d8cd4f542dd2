"""What a model's adapters obey (which of them act, how strongly): the model's own value, or that of an open block.

A block holds for the thread that opened it and for what runs in a copy of its context (`contextvars.copy_context`,
`asyncio.to_thread`). What is recomputed in a backward pass sees the values of its forward pass; see `recomputation`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Setting(Generic[T]):
    """One value that adapters obey.

    Attributes:
        value: The model's own, which every thread sees that has no block open.
    """

    def __init__(self, value: T) -> None:
        self.value = value
        with _LOCK:
            _LIVE.add(self)

    @property
    def now(self) -> T:
        """What holds here: the innermost open block's, or the model's own."""
        held = _TRACED.held if torch.compiler.is_compiling() else _HELD.get()
        return held.get(self, self.value)

    @contextmanager
    def block(self, value: T) -> Iterator[None]:
        """Another value for as long as the block lasts."""
        with _holding({**_HELD.get(), self: value}):
            yield

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model goes on as the model is now."""
        return type(self), (self.now,)


_HELD: ContextVar[Mapping[Setting[Any], Any]] = ContextVar("lowrank_held", default=MappingProxyType({}))
_LIVE: weakref.WeakSet[Setting[Any]] = weakref.WeakSet()
_LOCK = threading.Lock()


class _Traced(threading.local):
    """The same values where compiled code can see them: torch.compile cannot read a context variable."""

    def __init__(self) -> None:
        self.held: Mapping[Setting[Any], Any] = {}  # on the instance: a class's attribute is not guarded


_TRACED = _Traced()


@contextmanager
def _holding(held: Mapping[Setting[Any], Any]) -> Iterator[None]:
    before, traced = _HELD.get(), _TRACED.held
    _HELD.set(held)
    _TRACED.held = held
    try:
        yield
    finally:
        _HELD.set(before)
        _TRACED.held = traced


def pinned(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it would run now, whenever and in whatever thread it runs."""
    with _LOCK:
        live = list(_LIVE)
    held = {setting: setting.now for setting in live}

    def run(*args: Any, **kwargs: Any) -> Any:
        with _holding(held):
            return function(*args, **kwargs)

    return run
