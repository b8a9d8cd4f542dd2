"""An error in a few lines on standard error, and its exit code."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from textwrap import indent

from lowrank.errors import JobError, LowrankError


def told(error: Exception) -> int:
    """Prints what went wrong. Where it is none of lowrank's own errors, the traceback is kept in a file: a run that
    failed after hours need not be repeated to see it.

    Returns:
        The exit code.
    """
    if isinstance(error, LowrankError):
        # A mistake in what was given is every process's, and one tells it; a job may fail in one of them alone.
        if isinstance(error, JobError) or not _beside_others():
            _print(str(error))
        return error.exit_code
    with tempfile.NamedTemporaryFile("w", prefix="lowrank-", suffix=".txt", delete=False, encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    what = str(error).strip().splitlines() or ["no message"]
    _print(f"{type(error).__name__}: {what[0]}\nlowrank did not expect this; where it comes from is in {file.name}")
    return 1


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
