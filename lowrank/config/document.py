"""A YAML file as plain values that know where they stand and how they were written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lowrank.config.yamlcore import TAG, CoreDumper, CoreLoader

KeyPath = tuple[str | int, ...]
"""Where a value stands: ("training", "learning_rate"), ("adapter", "target_modules", 0)."""


def dotted(path: KeyPath) -> str:
    """The path as a person writes it: training.learning_rate, adapter.target_modules[0]."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


@dataclass(frozen=True)
class Problem:
    """One mistake.

    Attributes:
        where: "run.yaml:7" or "--set training.seed".
        key: "training.learning_rate", empty for the file as a whole.
        what: What is wrong with it, and what is allowed.
    """

    where: str
    key: str
    what: str

    def __str__(self) -> str:
        named = not self.key or self.where == f"--set {self.key}"
        return f"{self.where}: {self.what}" if named else f"{self.where}: {self.key}: {self.what}"


@dataclass
class Document:
    """A config as it was written.

    Attributes:
        name: The file.
        values: Plain dicts, lists and scalars.
        places: Where each value stands, by its path.
        written: What stands there, for scalars.
        problems: What is wrong with the YAML itself.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    written: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """Where `path`, or the nearest key above it, stands."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)

    def value(self, path: KeyPath) -> Any:
        """What was given at `path`, None if nothing was."""
        value: Any = self.values
        for key in path:
            if isinstance(value, dict):
                value = value.get(key)
            else:
                value = value[key] if isinstance(value, list) and isinstance(key, int) else None
        return value

    def shown(self, path: KeyPath) -> str:
        """The value at `path` as the user wrote it, texts in quotes, cut to a length that fits into a line."""
        value = self.value(path)
        text = repr(value) if isinstance(value, str) or path not in self.written else self.written[path]
        return text if len(text) <= 60 else f"{text[:57]}..."

    def forget(self, path: KeyPath) -> None:
        """Removes what is known of `path` and all below it."""
        for table in (self.places, self.written):
            for known in [known for known in table if known[: len(path)] == path]:
                del table[known]


def read_document(path: Path) -> Document:
    """Reads a YAML file; what is wrong with it is in `problems`."""
    document = Document(str(path))
    try:
        root = CoreLoader(path.read_text(encoding="utf-8-sig")).get_single_node()
    except FileNotFoundError:
        document.problems.append(
            Problem(str(path), "", f"there is no such file; `lowrank init DATA {path}` writes one")
        )
    except OSError as error:
        document.problems.append(Problem(str(path), "", f"cannot be read: {error.strerror}"))
    except UnicodeDecodeError:
        document.problems.append(Problem(str(path), "", "is not UTF-8 text"))
    except yaml.YAMLError as error:
        document.problems.append(invalid(str(path), error))
    except RecursionError:
        document.problems.append(Problem(str(path), "", "is nested too deeply"))
    else:
        if isinstance(root, yaml.MappingNode):
            document.values = values_of(document, None, root, ())
        else:
            document.problems.append(Problem(str(path), "", "holds no sections; a config begins with `model:`"))
    return document


def document_of(values: Mapping[str, Any]) -> Document:
    """A config that Python gives as a mapping, by the same rules as a file's."""
    document = Document("config")
    try:
        root = CoreLoader(yaml.dump(_plain(values), Dumper=CoreDumper, sort_keys=False)).get_single_node()
    except yaml.representer.RepresenterError as error:
        what = f"{error.args[-1]!r} is neither a text, a number, true, false, null, a list nor a mapping"
        document.problems.append(Problem("config", "", what))
    else:
        assert root is not None, "a mapping is written as one"
        document.values = values_of(document, "config", root, ())
    return document


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def invalid(where: str, error: yaml.YAMLError) -> Problem:
    """YAML that cannot be read, as a problem."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "context", None) or str(error).splitlines()[0]
    line = f":{mark.line + 1}" if mark is not None and not where.startswith("--set") else ""
    return Problem(f"{where}{line}", "", f"not valid YAML: {what}")


def values_of(document: Document, where: str | None, node: yaml.Node, path: KeyPath) -> Any:
    """A node's value; places, texts and problems go to the document.

    Args:
        document: What is filled.
        where: Where all of it stands; None: each at its line.
        node: What was written.
        path: The key that it is the value of.
    """
    return _Values(document, where).of(node, path)


@dataclass
class _Values:
    """From nodes to values; places, texts and problems go to the document.

    Attributes:
        document: What is filled.
        where: Where all of it stands; None: each at its line.
    """

    document: Document
    where: str | None

    def of(self, node: yaml.Node, path: KeyPath) -> Any:
        """The node's value."""
        kind = node.tag.removeprefix(TAG)
        if isinstance(node, yaml.CollectionNode) and kind not in ("map", "seq"):
            self._problem(node, path, f"the tag {kind} is not supported")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.document.places[(*path, index)] = self._place(item)
            return [self.of(item, (*path, index)) for index, item in enumerate(node.value)]
        self.document.written[path] = node.value
        try:
            return CoreLoader("").construct_object(node)
        except (yaml.MarkedYAMLError, ValueError):
            self._problem(node, path, f"{node.value!r} cannot be read as {kind}")
            return None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, path, "a key is a word, not a list or a mapping")
                continue
            if key_node.value == "<<" and key_node.style is None:
                self._merged(
                    value_node,
                    path,
                    values,
                    own=[key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)],
                )
                continue
            inner = (*path, key_node.value)
            if key_node.value in values:
                self._problem(key_node, inner, f"stands at {self.document.places[inner]} already")
                self.document.forget(inner)
            self.document.places[inner] = self._place(key_node)
            values[key_node.value] = self.of(value_node, inner)
        return values

    def _merged(self, node: yaml.Node, path: KeyPath, values: dict[str, Any], own: list[str]) -> None:
        """Takes the keys of a mapping (of several, the first one wins) that is merged into another, but for its own."""
        for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(part, yaml.MappingNode):
                self._problem(node, (*path, "<<"), "merges mappings alone, such as `<<: *name`")
                return
            known = {*own, *values}
            left = [(key, value) for key, value in part.value if str(key.value) not in known - {"<<"}]
            values |= self._mapping(yaml.MappingNode(part.tag, left, part.start_mark), path)

    def _place(self, node: yaml.Node) -> str:
        return self.where or f"{self.document.name}:{node.start_mark.line + 1}"

    def _problem(self, node: yaml.Node, path: KeyPath, what: str) -> None:
        self.document.problems.append(Problem(self._place(node), dotted(path), what))
