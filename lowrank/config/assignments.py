"""`--set section.key=value`: what is given on the command line, put into a document.

The value is all that follows the first `=`, taken whole: `#`, `:`, `*`, `&`, `!` and quotes inside of it mean nothing.
Only a value that begins with `[`, `{`, `"` or `'` is read as YAML: a list, a mapping, or a text in quotes. Of the rest,
null (or nothing at all) is no value, and what YAML reads as a number, true or false is that, unless the key takes
nothing but texts: `training.output_dir=2024` is a folder.
"""

from __future__ import annotations

from typing import Any

import yaml

from lowrank.config.document import Document, KeyPath, Problem, invalid, values_of
from lowrank.config.keys import field_at
from lowrank.config.type_words import allowed
from lowrank.config.yamlcore import TAG, CoreLoader

_SCALARS = ("bool", "int", "float")


def override(document: Document, assignment: str) -> None:
    """Applies one `section.key=value`; what is wrong with it is in the document's `problems`."""
    name, equals, text = assignment.partition("=")
    where = f"--set {name}"
    keys: KeyPath = tuple(name.split("."))
    if not equals or not all(keys):
        what = "write section.key=value, such as training.learning_rate=1e-4"
        document.problems.append(Problem(f"--set {assignment}", "", what))
        return
    node = _node(document, where, keys, text.strip())
    section = None if node is None else _section(document, where, keys)
    if node is None or section is None:
        return
    document.forget(keys)
    document.places[keys] = where
    section[str(keys[-1])] = values_of(document, where, node, keys)


def _node(document: Document, where: str, keys: KeyPath, text: str) -> yaml.Node | None:
    """What was given, None where it cannot be read."""
    if text[:1] not in tuple("[{\"'"):
        return _whole(document, keys, text)
    try:
        node = CoreLoader(text).get_single_node()
    except yaml.YAMLError as error:
        document.problems.append(invalid(where, error))
        return None
    assert node is not None, "it begins with something"
    if left := text[node.end_mark.index :].strip():  # pyrefly: ignore[missing-attribute]
        document.problems.append(Problem(where, "", f"not valid YAML: {left!r} follows the value"))
        return None
    return node


def _whole(document: Document, keys: KeyPath, text: str) -> yaml.ScalarNode:
    tag = CoreLoader("").resolve(yaml.ScalarNode, text, (True, False))
    if tag.removeprefix(TAG) in _SCALARS and _only_text(document, keys):
        tag = f"{TAG}str"
    return yaml.ScalarNode(tag, text)


def _only_text(document: Document, keys: KeyPath) -> bool:
    """Whether the key takes texts, and neither numbers nor true and false."""
    field = field_at(keys, document)
    kinds = [] if field is None else allowed(*field)
    return "a text" in kinds and not any("number" in kind or "true" in kind for kind in kinds)


def _section(document: Document, where: str, keys: KeyPath) -> dict[str, Any] | None:
    """The mapping that the last key stands in, made where it is missing; None where something else is in its place."""
    section = document.values
    for depth in range(1, len(keys)):
        key = str(keys[depth - 1])
        if section.get(key) is None:
            section[key] = {}
            document.forget(keys[:depth])
            document.places[keys[:depth]] = where
        if not isinstance(section[key], dict):
            document.problems.append(Problem(where, ".".join(map(str, keys[:depth])), "is no section"))
            return None
        section = section[key]
    return section
