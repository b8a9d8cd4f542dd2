"""A file that is there as a whole or as it was before, also when the process or the machine dies meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from lowrank.storage.folders import sync


def write_whole(path: Path, text: str) -> None:
    """Writes beside `path`, syncs, and takes its place.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    beside = unfinished(path)
    try:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)  # on a full disk it holds room
        raise
    sync(path.parent)


def unfinished(path: Path) -> Path:
    """What a death in `write_whole` leaves; the next one writes over it."""
    return path.with_name(f".{path.name}.unfinished")
