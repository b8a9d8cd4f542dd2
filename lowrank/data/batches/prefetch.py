"""Batches, or what they are made from, made ready while the model works on the ones before."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Ended:
    """The last thing in the queue: why nothing follows."""

    error: BaseException | None


class Prefetched(Iterator[T]):
    """Items from a thread that is a few ahead; `blocked` is the time in seconds spent waiting for one.

    Order and content are those of the iterator it draws from. Close it (or leave its `with` block) to stop the thread
    before the end.
    """

    def __init__(self, items: Iterator[T], depth: int = 4) -> None:
        """Start drawing from `items`, at most `depth` ahead."""
        self.blocked = 0.0
        self._queue: Queue[T | _Ended] = Queue(maxsize=depth)
        self._stop = Event()
        self._thread = Thread(target=self._fill, args=(items,), name="lowrank-batches", daemon=True)
        self._thread.start()

    def _fill(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(_Ended(None))
        except BaseException as error:  # raised again where the item is asked for
            self._put(_Ended(error))
        finally:
            if isinstance(items, Generator):  # one that draws from a thread of its own ends that
                items.close()

    def _put(self, item: T | _Ended) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except Full:
                continue
            return True
        return False

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        started = time.perf_counter()
        item = self._queue.get()
        self.blocked += time.perf_counter() - started
        if not isinstance(item, _Ended):
            return item
        self.close()
        raise item.error or StopIteration

    def close(self) -> None:
        """Stop the thread; what it had ready is lost."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except Empty:
                self._thread.join(timeout=0.05)

    def __enter__(self) -> Prefetched[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
