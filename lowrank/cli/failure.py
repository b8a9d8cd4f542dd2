"""An error in a few lines on standard error, and its exit code."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from textwrap import indent

from lowrank.errors import JobError, LowrankError

_GIVEN = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY}
_GIVEN |= {errno.ENAMETOOLONG, errno.EROFS, errno.ELOOP, errno.EXDEV}
"""What is wrong with a file of that name, not with the machine."""


def told(error: Exception) -> int:
    """Prints what went wrong. Where it is none of lowrank's own errors, nor a file's, the traceback is kept: a run that
    failed after hours need not be repeated to see it.

    Returns:
        The exit code.
    """
    if isinstance(error, LowrankError):
        # A mistake in what was given is every process's, and one tells it; a job may fail in one of them alone.
        if isinstance(error, JobError) or not _beside_others():
            _print(str(error))
        return error.exit_code
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        _print(f"{os.fsdecode(error.filename)}: {error.strerror.lower()}")
        return 2 if error.errno in _GIVEN else 1
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding() != "utf-8":
        _print(f"{error.object!r}: files cannot be named so here\nSet PYTHONUTF8=1, or a locale of UTF-8.")
        return 2
    what = (str(error).strip().splitlines() or ["no message"])[0]
    _print(f"{type(error).__name__}: {what}\nlowrank did not expect this; {_kept(error)}")
    return 1


def _kept(error: Exception) -> str:
    """Where its traceback is; here, if there is no room for a file."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="lowrank-", suffix=".txt", delete=False, encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
    except (OSError, ValueError):
        return f"it comes from here:\n{''.join(traceback.format_exception(error))}"
    return f"where it comes from is in {file.name}"


def _beside_others() -> bool:
    """Whether another process of this run is there to tell the same."""
    rank, count = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    launched = rank.isdecimal() and count.isdecimal() and "MASTER_ADDR" in os.environ
    return launched and 0 < int(rank) < int(count)


def _print(message: str) -> None:
    first, _, rest = message.partition("\n")
    print(f"error: {first}", file=sys.stderr)
    if rest:
        print(indent(rest, " " * len("error: ")), file=sys.stderr)
