"""Output that cannot fail a job: what a stream cannot show is an escape in it, and one that is gone gets nothing."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET}


class Unfailing:
    """A text stream around another one, as far as that goes: `head` may have ended, a terminal may be closed, a disk
    full, and the encoding may know no letter but the first 128."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes what can be written."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._let_go(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hands on what is held back."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._let_go(error)

    def _let_go(self, error: Exception) -> None:
        """What is held back for a stream that is gone would be tried again, and fail, as the interpreter ends."""
        if isinstance(error, OSError) and error.errno in _GONE:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def unfailing(stream: Any) -> Any:
    """The stream as one that does not fail; None, which is a closed one, stays."""
    return stream if stream is None or isinstance(stream, Unfailing) else Unfailing(stream)


@contextmanager
def unfailing_output() -> Iterator[None]:
    """While it lasts, standard output and errors do not fail."""
    _open_the_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = unfailing(sys.stdout), unfailing(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        _drop_what_is_left(before)
        sys.stdout, sys.stderr = before


def _open_the_closed() -> None:
    """The next file that is opened takes the number of a closed one: what is printed would end up in a checkpoint."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, number, how in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, how, encoding="utf-8", closefd=False))  # noqa: SIM115


def _drop_what_is_left(streams: tuple[Any, Any]) -> None:
    """What a full disk has no room for even at the end would make an error of a job that is done."""
    for stream in streams:
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
