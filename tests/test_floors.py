"""The one rule of the house: a room imports only rooms on lower floors (CONTRIBUTING.md shows them)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lowrank"

FLOORS = {
    "errors": 0,
    "paths": 0,
    "ops": 0,
    "adapters": 1,
    "attention": 1,
    "weights": 2,
    "data": 2,
    "models": 2,
    "training": 3,
    "config": 4,
    "recipes": 5,
    "cli": 6,
}


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every lowrank module that a file of `package` imports, wherever and however it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "lowrank")
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*above, *([node.module] if node.module else [])])
            if name == "lowrank":
                yield from ((node.lineno, f"lowrank.{alias.name}") for alias in node.names)
            elif name.startswith("lowrank."):
                yield node.lineno, name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            yield from ((node.lineno, name) for name in names if str(name).startswith("lowrank."))


def breaches(path: Path, source: str) -> list[str]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    room, package = parts[0], ".".join(["lowrank", *parts[:-1]])
    found = []
    for line, name in imported(source, package):
        other = name.split(".")[1] if "." in name else ""
        same_floor = FLOORS.get(other, 99) == FLOORS[room] and other != room
        # Errors are there for everyone, on the ground floor too.
        if (FLOORS.get(other, 99) > FLOORS[room] or same_floor) and other != "errors":
            found.append(f"{path.name}:{line}: {room} (floor {FLOORS[room]}) imports {name}")
    return found


def test_contributing_shows_the_house_as_it_is():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert {room: int(floor) for floor, room in re.findall(r"^ (\d)  (\w+) ", text, re.MULTILINE)} == FLOORS


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem in FLOORS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_lower_rooms(path):
    assert breaches(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("room", ["config", "cli"])
def test_what_answers_at_once_loads_nothing_heavy(room):
    heavy = {"torch", "transformers", "datasets", "accelerate", "numpy"}
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert heavy.isdisjoint(name.split(".")[0] for name in names), path


def test_every_room_has_a_floor():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert rooms - {"__init__", "__main__", "__pycache__", "py"} == set(FLOORS)


@pytest.mark.parametrize(
    "source",
    [
        "import lowrank.training.loop",
        "from lowrank.weights import save",
        "from lowrank import attention",
        "from ..training import loop",
        "from .. import data",
        "def f():\n    from lowrank.cli import main",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lowrank.data import Examples",
        "from lowrank import LoraConfig",
        "import lowrank",
        "from importlib import import_module\nimport_module('lowrank.config')",
    ],
)
def test_a_breach_is_found(source):
    assert len(breaches(PACKAGE / "adapters" / "x.py", source)) == 1


def test_what_is_allowed_is_let_through():
    source = (
        "import torch\nfrom lowrank.ops import merging\nfrom lowrank.errors import InputError\nfrom .host import hosts"
    )
    assert breaches(PACKAGE / "adapters" / "x.py", source) == []
