"""The one rule of the house: a room imports only rooms on lower floors (CONTRIBUTING.md shows them)."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lowrank"

FLOORS = {
    "errors": 0,
    "paths": 0,
    "lazily": 0,
    "named_function": 1,
    "ops": 0,
    "storage": 1,
    "quantisers": 2,
    "attention": 2,
    "adapters": 3,
    "weights": 4,
    "data": 4,
    "models": 4,
    "tasks": 5,
    "training": 5,
    "config": 6,
    "recipes": 7,
    "cli": 8,
}

INSIDE = {
    "ops": [{"precision", "made_again"}, {"kernels"}],
    "adapters": [
        {"kinds", "config", "activity"},
        {"modules"},
        {"targeting"},
        {"initialisations"},
        {"methods"},
        {"experts"},
    ],
    "data": [{"reading"}, {"examples"}, {"supervision"}, {"loading"}, {"batches"}, {"preview"}],
    "weights": [{"files"}, {"arithmetic", "merging"}],
    "training": [
        {"machine", "diagnosis", "reach"},
        {"losses", "optimisers", "transforms", "steps"},
        {"evaluation"},
        {"run"},
        {"checkpoints", "callbacks", "loop"},
    ],
    "recipes": [{"parts"}],
}
"""The sub-rooms of a room, and what stands between them, ground floor first; whatever is not named stands above."""


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


def breaches_inside(path: Path, source: str) -> list[str]:
    """The same between the sub-rooms of one room."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    room = parts[0]
    floors = {entry: floor for floor, entries in enumerate(INSIDE.get(room, [])) for entry in entries}
    mine = floors.get(parts[1], len(floors))
    found = []
    for line, name in imported(source, ".".join(["lowrank", *parts[:-1]])):
        other = [*name.split("."), "", ""][2]
        theirs = floors.get(other, len(floors))
        beside = other == parts[1] or (theirs == mine == len(floors))
        if name.split(".")[1:2] == [room] and other and theirs >= mine and not beside:
            found.append(f"{path.name}:{line}: {room}/{parts[1]} imports {name}")
    return found


def test_contributing_shows_the_house_as_it_is():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert {room: int(floor) for floor, room in re.findall(r"^ (\d)  (\w+) ", text, re.MULTILINE)} == FLOORS


def test_contributing_shows_the_sub_rooms_as_they_are():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = dict(re.findall(rf"^({'|'.join(INSIDE)})  +(.+(?:\n  +.+)*)$", text, re.MULTILINE))
    floors = {room: [set(re.findall(r"\w+", floor)) for floor in line.split(">")] for room, line in shown.items()}
    assert floors == INSIDE


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem in FLOORS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_lower_rooms(path):
    assert breaches(path, path.read_text(encoding="utf-8")) == []


WITHIN = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in INSIDE and path.name != "__init__.py"]


@pytest.mark.parametrize("path", WITHIN, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_sub_room_imports_only_lower_ones(path):
    assert breaches_inside(path, path.read_text(encoding="utf-8")) == []


def test_no_circles():
    """Not even of imports inside of functions, or for type checkers alone."""
    sources = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    graph = {name: set(depends(path, sources)) - {name} for name, path in sources.items()}
    assert circle(graph) is None


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def name_of(path: Path) -> str:
    return ".".join(["lowrank", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def depends(path: Path, modules: Collection[str]) -> Iterator[str]:
    """The modules that a file imports; where it takes one out of a package, that one and not the package."""
    source = path.read_text(encoding="utf-8")
    taken = {
        f"{node.module}.{alias.name}": node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if f"{node.module}.{alias.name}" in modules
    }
    package = ".".join(["lowrank", *path.relative_to(PACKAGE).parts[:-1]])
    yield from taken
    yield from (name for _, name in imported(source, package) if name in modules and name not in taken.values())


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import one another in a ring, None where there is no ring."""
    done: set[str] = set()

    def walk(name: str, above: list[str]) -> list[str] | None:
        if name in above:
            return above[above.index(name) :]
        if name in done:
            return None
        found = next(filter(None, (walk(other, [*above, name]) for other in sorted(graph[name]))), None)
        done.add(name)
        return found

    return next(filter(None, (walk(name, []) for name in sorted(graph))), None)


def test_every_sub_room_has_a_floor():
    for room, floors in INSIDE.items():
        rooms = {path.name for path in (PACKAGE / room).iterdir() if (path / "__init__.py").exists()}
        assert rooms <= set().union(*floors) | {"proposal"}, room


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("adapters/kinds/x.py", "def f():\n    from lowrank.adapters.registry import METHODS"),
        ("adapters/initialisations/x.py", "from lowrank.adapters.methods.lora import Lora"),
        ("data/reading/x.py", "from lowrank.data.batches.batch import Batch"),
        ("data/reading/x.py", "from lowrank.data.batches import batch"),
        ("training/losses/x.py", "from lowrank.training.loop import fit"),
        ("training/machine/x.py", "def f():\n    from lowrank.training.steps import groups"),
        ("weights/merging/x.py", "from lowrank.weights.arithmetic import factors"),
        ("weights/merging/x.py", "from lowrank.weights.exporting import export"),
        ("recipes/parts/x.py", "import lowrank.recipes.train"),
    ],
)
def test_a_breach_between_sub_rooms_is_found(place, source):
    assert len(breaches_inside(PACKAGE / place, source)) == 1


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
        "from lowrank import weights",
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
