"""`README.md` beside an adapter: one that a person wrote or changed is told from one that was made, and is kept."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

FILE = "README.md"
_SIGNATURE = re.compile(r"\n<!-- made by lowrank, sha256 ([0-9a-f]{64}); once changed, it is kept -->\n\Z")


def signed(text: str) -> str:
    """A card with its own hash as its last line, which Markdown does not show."""
    text = text.rstrip("\n") + "\n"
    return f"{text}\n<!-- made by lowrank, sha256 {_hash(text)}; once changed, it is kept -->\n"


def is_made(text: str) -> bool:
    """Whether this is what `signed` gave, to the letter."""
    found = _SIGNATURE.search(text)
    return found is not None and found[1] == _hash(text[: found.start()])


def may_write(folder: Path) -> bool:
    """Whether a folder has no card, or one that nobody has changed."""
    file = folder / FILE
    if not file.exists():
        return True
    try:
        return is_made(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
