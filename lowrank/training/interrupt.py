"""Ctrl-C and SIGTERM: once stops after the current step, twice stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lowrank.training.callbacks import Run


@contextmanager
def stopping_softly(run: Run) -> Iterator[None]:
    """While it lasts a first signal asks the run to stop, and the next one is the interpreter's own again.

    Only a process's main thread can set this up; in another one signals stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        run.interrupted = True
        print("stopping after this step; once more stops at once and loses it", file=sys.stderr, flush=True)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        restore()
