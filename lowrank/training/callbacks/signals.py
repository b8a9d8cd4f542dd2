"""Signals that end a run: the first one stops it after the current step, and what it learned is saved.

Ctrl-C or SIGTERM a second time stops at once. SIGHUP (a terminal closes) and SIGUSR1 (a scheduler's warning that the
time is nearly up) are sent by machines, often several times: after the first signal they change nothing. One that the
process ignores already, as under nohup, stays ignored."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from lowrank.training.run import Run

_PEOPLES = (signal.SIGINT, signal.SIGTERM)
_MACHINES = (signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def stopping_softly(run: Run) -> Iterator[None]:
    """While it lasts a first signal asks the run to stop; a next one from a person is the interpreter's own again.

    Only a process's main thread can set this up; in another one signals stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*_PEOPLES, *_MACHINES) if _is_free(number)}

    def ask(number: int, frame: FrameType | None) -> None:
        run.interrupted = True
        with suppress(OSError, ValueError):  # the terminal may be what has gone
            print("stopping after this step; once more stops at once and loses it", file=sys.stderr, flush=True)
        for each in before:
            signal.signal(each, signal.SIG_IGN if each in _MACHINES else before[each])

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def saving(run: Run) -> Iterator[None]:
    """While it lasts what machines send does not keep a run that was stopped from saving what it learned."""
    if not run.interrupted or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _MACHINES if _is_free(number)}
    for number in before:
        signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_free(number: signal.Signals) -> bool:
    """Whether nobody has said what becomes of the signal: for SIGHUP and SIGUSR1 another program's word stands."""
    handler = signal.getsignal(number)
    return handler == signal.SIG_DFL if number in _MACHINES else handler not in (signal.SIG_IGN, None)
