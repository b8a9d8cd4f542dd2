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

from lowrank.errors import InputError

T = TypeVar("T")


class Setting(Generic[T]):
    """One value that adapters obey.

    Args:
        value: The model's own.
    """

    def __init__(self, value: T) -> None:
        self._value, self._changed_at = value, _nodes()
        with _LOCK:
            _LIVE.add(self)

    @property
    def value(self) -> T:
        """The model's own, which every thread sees that has no block open."""
        return self._value

    @value.setter
    def value(self, value: T) -> None:
        self._value, self._changed_at = value, _nodes()

    @property
    def now(self) -> T:
        """What holds here: the innermost open block's, or the model's own.

        Raises:
            InputError: a forward pass runs again in a backward pass, and what held then is not known.
        """
        if torch.compiler.is_compiling():
            return _TRACED.held.get(self, self._value)
        held = _HELD.get()
        if torch._C._current_graph_task_id() != -1 and _KNOWN not in held:
            self._check_unchanged()
        return held.get(self, self._value)

    def _check_unchanged(self) -> None:
        node = torch._C._current_autograd_node()
        if node is not None and node._sequence_nr() < self._changed_at:
            raise InputError(
                "a layer is computed again in the backward pass, not by torch.utils.checkpoint, and other adapters or "
                "scales have been set since its forward pass",
                fix="Run backward() before the block ends, or recompute with torch.utils.checkpoint.",
            )

    @contextmanager
    def block(self, value: T) -> Iterator[None]:
        """Another value for as long as the block lasts."""
        inside = {} if torch._C._current_graph_task_id() == -1 else {_KNOWN: True}
        self._changed_at = _nodes()
        try:
            with _holding({**_HELD.get(), **inside, self: value}):
                yield
        finally:
            self._changed_at = _nodes()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model goes on as the model is now."""
        return type(self), (self.now,)


_HELD: ContextVar[Mapping[Any, Any]] = ContextVar("lowrank_held", default=MappingProxyType({}))
_KNOWN = "what is recomputed"
"""Beside the values that are held: they are those of the forward pass that is computed again, or set since it began."""
_LIVE: weakref.WeakSet[Setting[Any]] = weakref.WeakSet()
_LOCK = threading.Lock()


class _Traced(threading.local):
    """The same values where compiled code can see them: torch.compile cannot read a context variable."""

    def __init__(self) -> None:
        self.held: Mapping[Any, Any] = {}  # on the instance: a class's attribute is not guarded


_TRACED = _Traced()


@contextmanager
def _holding(held: Mapping[Any, Any]) -> Iterator[None]:
    before, traced = _HELD.get(), _TRACED.held
    _HELD.set(held)
    _TRACED.held = held
    try:
        yield
    finally:
        _HELD.set(before)
        _TRACED.held = traced


def _nodes() -> int:
    """How many nodes autograd has made in this thread: one that was made later has a number from here on."""
    return torch.autograd._get_sequence_nr()


def pinned(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it would run now, whenever and in whatever thread it runs."""
    with _LOCK:
        live = list(_LIVE)
    held = {_KNOWN: True, **{setting: setting.now for setting in live}}

    def run(*args: Any, **kwargs: Any) -> Any:
        with _holding(held):
            return function(*args, **kwargs)

    return run
