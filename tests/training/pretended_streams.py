"""CUDA streams without a card: copies happen as late as events allow, and ruin what they will overwrite at once.

What is computed is computed when it is asked for. A copy on another stream fills its target with NaN when it is asked
for, and its values come when the computing stream waits for them: a wait that is missing gives NaN. A copy into memory
that was computed with since the last event that the copying stream waits for is an error: on a card it could come first.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


@dataclass(eq=False)
class Stream:
    device: Any = None
    after: int = 0  # computed operations that are done before what comes next

    def wait_event(self, event: Event) -> None:
        self.after = max(self.after, event.computed)


@dataclass(eq=False)
class Computing(Stream):
    card: Card | None = None

    def wait_event(self, event: Event) -> None:
        assert self.card is not None
        self.card.finish(event)


@dataclass(eq=False)
class Event:
    card: Card
    computed: int = 0
    copies: int = 0

    def record(self, stream: Stream) -> None:
        self.computed = self.card.computed if isinstance(stream, Computing) else stream.after
        self.copies = len(self.card.asked)


@dataclass(eq=False)
class Copy:
    """Asked for when so much was computed, waited for when so much was (None: not yet)."""

    target: torch.Tensor
    source: torch.Tensor
    asked_at: int
    waited_at: int | None = None


@dataclass(eq=False)
class Card(TorchDispatchMode):
    """The mode; `installed` puts it in torch.cuda's place."""

    values: bool = True
    computed: int = 0
    asked: list[Copy] = field(default_factory=list)
    read: dict[int, int] = field(default_factory=dict)  # when a memory was last computed with
    registered: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.computing = Computing(card=self)
        self.current: Stream = self.computing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(self.current, Computing):
            if func is torch.ops.aten.copy_.default:
                return self._copy(*args)
            return func(*args, **(kwargs or {}))
        if not func.is_view:
            self.computed += 1
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    self.read[leaf.untyped_storage()._cdata] = self.computed
        return func(*args, **(kwargs or {}))

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        assert non_blocking
        if self.values:
            assert self.registered[source.data_ptr()] >= source.nbytes, "not from pinned memory"
        assert self.current.after >= self.read.get(target.untyped_storage()._cdata, 0), "what is there is in use"
        if self.values:
            target.fill_(255)
        self.asked.append(Copy(target.detach(), source, self.computed))
        return target

    def finish(self, event: Event) -> None:
        with torch.no_grad(), _disable_current_modes():
            for copy in self.asked[: event.copies]:
                if copy.waited_at is None:
                    copy.target.copy_(copy.source)
                    copy.waited_at = self.computed

    @contextmanager
    def on(self, stream: Stream) -> Any:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def installed(self, monkeypatch: Any) -> Card:
        def register(at: int, size: int, flags: int) -> int:
            self.registered[at] = size
            return 0

        runtime = SimpleNamespace(
            cudaHostRegister=register, cudaHostUnregister=lambda at: self.registered.pop(at, None)
        )
        for name, value in {
            "Stream": Stream,
            "Event": lambda: Event(self),
            "stream": self.on,
            "current_stream": lambda device=None: self.computing,
            "cudart": lambda: runtime,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        return self
