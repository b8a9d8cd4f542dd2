"""A room's names, each loaded when it is first used: importing the room costs nothing, and no torch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def on_first_use(room: str, file: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """What a package says of itself: `__getattr__, __dir__, __all__ = on_first_use(__name__, __file__)`.

    Its names are those that its `__init__.py` imports for type checkers, under `if TYPE_CHECKING`. None of them may be
    called as a module of the package: importing that would take the name's place.

    Args:
        room: The package.
        file: Its `__init__.py`.
    """
    homes = {name: home for home, names in imported_for_types(Path(file).read_text(encoding="utf-8")) for name in names}

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        found = getattr(import_module(homes[name]), name)
        setattr(sys.modules[room], name, found)
        return found

    names = sorted(homes)
    return load, lambda: names, names


def imported_for_types(source: str) -> list[tuple[str, list[str]]]:
    """(module, names) of each `from module import names` under `if TYPE_CHECKING:` in a file."""
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    found = [line for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING" for line in block.body]
    return [
        (line.module or "", [alias.name for alias in line.names]) for line in found if isinstance(line, ast.ImportFrom)
    ]
