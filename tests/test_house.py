"""What keeps the house readable: how long a file and a function may be, how a file is called, who sees a whole config."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lowrank"
FILES = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}

MOST_LINES, MOST_OF_A_FUNCTION = 400, 60
TOO_LONG: set[str] = set()
"""What is too long still: whoever shortens one takes it off, and none is put on."""

VERBS = {place.removeprefix("recipes/") for place in FILES if place.startswith("recipes/") and place.count("/") == 1}
SHARED = {"__init__.py", "registry.py"}
SECTIONS = {"model", "quantization", "adapter", "data", "training"}


def lengths(place: str, source: str) -> Iterator[tuple[str, int, int]]:
    """(what, its lines, how many it may have) of a file and of its functions, docstrings counted."""
    yield place, len(source.splitlines()), MOST_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            yield f"{place}:{node.name}", node.end_lineno - node.lineno + 1, MOST_OF_A_FUNCTION


def test_files_and_functions_fit_on_a_screen():
    found = [entry for place, source in FILES.items() for entry in lengths(place, source)]
    assert {what for what, lines, most in found if lines > most} == TOO_LONG


def test_no_two_files_are_called_the_same():
    """But a verb's job and its command, in recipes/ and cli/, and the lists of what a room has a file each of."""
    called = defaultdict(list)
    for place in FILES:
        if place.removeprefix("cli/") not in VERBS:
            called[Path(place).name].append(place)
    assert {name: places for name, places in called.items() if len(places) > 1 and name not in SHARED} == {}


def sees_too_much(source: str) -> list[str]:
    """The functions that take a whole config and read no more than two of its sections."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]:
            if argument.annotation is not None and ast.unparse(argument.annotation) == "RunConfig":
                uses = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == argument.arg]
                read = {id(n.value): n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)}
                sections = {read.get(id(use)) for use in uses}
                if sections <= SECTIONS and len(sections) <= 2:  # else it is handed on, compared or written as a whole
                    found.append(f"{function.name}({argument.arg}) reads {sorted(map(str, sections))}")
    return found


RECIPES = [place for place in FILES if place.startswith("recipes/")]


@pytest.mark.parametrize("place", RECIPES)
def test_recipes_take_what_they_use_of_a_config(place):
    assert sees_too_much(FILES[place]) == []


def test_a_function_that_takes_more_than_it_uses_is_found():
    assert sees_too_much("def f(config: RunConfig):\n    return config.data.eval, config.model.dtype") != []
    assert sees_too_much("def f(config: RunConfig):\n    return dump(config)") == []
    assert sees_too_much("def f(now: RunConfig):\n    return now.data, now.model, now.training") == []


def test_a_job_exports_itself_alone():
    """The names that `recipes/train.py` defines without an underscore."""
    tree = ast.parse(FILES["recipes/train.py"])
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert {name for name in defined if not name.startswith("_")} == {"train"}
