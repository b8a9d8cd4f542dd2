"""A config with a section `sweep`: one config for each combination of the values that it lists.

sweep:
  training.learning_rate: [1e-4, 3e-4, 1e-3]
  adapter.r: [8, 32]
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.config.assignments import override
from lowrank.config.checking import check
from lowrank.config.document import Document, KeyPath, Problem, read_document
from lowrank.config.keys import field_at, unknown
from lowrank.config.loading import ConfigError
from lowrank.config.run_config import RunConfig
from lowrank.paths import expanded

SECTION = "sweep"
MOST = 256
"""Combinations: more than a person will wait for, or read."""

_FIXED = {
    "training.output_dir": "each combination has a folder of its own in it",
    "training.num_processes": "a sweep is one process",
    "training.report_to": "it changes no number",
    "data.eval": "results are compared on the same rows",
    "data.max_eval_rows": "results are compared on the same rows",
}
"""What a sweep does not vary, and why."""


@dataclass(frozen=True)
class Combination:
    """One of a sweep's configs.

    Attributes:
        name: Of its folder.
        settings: What was chosen, by "section.key".
        config: With it.
    """

    name: str
    settings: Mapping[str, Any]
    config: RunConfig


@dataclass(frozen=True)
class Sweep:
    """A config's combinations.

    Attributes:
        output_dir: Of the whole.
        combinations: In the order of the lists, the last one running fastest.
    """

    output_dir: Path
    combinations: Sequence[Combination]


def read_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Reads a config with a section `sweep`.

    Args:
        path: A YAML file.
        overrides: `section.key=value` each; what the sweep varies stands before them.

    Raises:
        ConfigError: whatever is wrong, all of it, each with its line.
    """
    document = read_document(Path(expanded(path)))
    for assignment in [] if document.problems and not document.values else overrides:
        override(document, assignment)
    given = document.values.pop(SECTION, None)
    if document.problems:
        raise ConfigError(document.problems)
    lists, found = _last_said(document, dict(_lists(given, (SECTION,))))
    found += [problem for place, values in lists.items() for problem in _wrong(document, place, values)]
    if not lists:
        what = "names nothing to vary; write section.key: [value, value] below it, one a line"
        found = [Problem(document.place((SECTION,)), SECTION, what)]
    if found:
        raise ConfigError(found)
    count = math.prod(len(values) for values in lists.values())
    if count > MOST:
        sizes = " x ".join(str(len(values)) for values in lists.values())
        what = f"is {count:,} combinations ({sizes}), each of them a run; it takes up to {MOST}: list fewer values"
        raise ConfigError([Problem(document.place((SECTION,)), SECTION, what)])
    return _combined(document, lists)


def _lists(value: Any, place: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """What stands below the section, by where it stands: keys may be dotted, nested, or both."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _lists(inner, (*place, key))
    elif len(place) > 1:
        yield place, value


def _last_said(document: Document, given: Mapping[KeyPath, Any]) -> tuple[dict[KeyPath, Any], list[Problem]]:
    """The lists, one for each key: `--set` stands before what the file says; a file that says it twice is wrong."""
    places: dict[str, KeyPath] = {}
    twice = []
    for place in given:
        earlier = places.get(_key(place))
        if earlier is not None and not document.place(place).startswith("--set"):
            what = f"stands at {document.place(earlier)} already"
            twice.append(Problem(document.place(place), f"{SECTION}.{_key(place)}", what))
        places[_key(place)] = place
    return {place: given[place] for place in places.values()}, twice


def _key(place: KeyPath) -> str:
    """The key that a list in the section is for."""
    return ".".join(map(str, place[1:]))


def _wrong(document: Document, place: KeyPath, values: Any) -> Iterator[Problem]:
    key = _key(place)
    path: KeyPath = tuple(key.split("."))

    def problem(what: str) -> Problem:
        return Problem(document.place(place), f"{SECTION}.{key}", what)

    if key in _FIXED:
        yield problem(f"cannot vary: {_FIXED[key]}")
    elif len(path) < 2 or path[0] not in RunConfig.model_fields:
        yield problem("is no section.key of a config, such as training.learning_rate")
    elif field_at(path, document) is None and path != ("adapter", "method"):
        yield problem(unknown(path, document))
    elif not isinstance(values, list):
        yield problem("takes a list of the values to try, such as [1e-4, 3e-4]")
    elif not values:
        yield problem("is an empty list: there is nothing to try")
    elif twice := [value for at, value in enumerate(values) if value in values[:at]]:
        yield problem(f"names {twice[0]!r} twice")


def _combined(document: Document, lists: Mapping[KeyPath, list[Any]]) -> Sweep:
    """Each combination as a config of its own; a mistake in a value is told at the value's own line."""
    made: list[tuple[dict[str, Any], list[str]]] = []
    problems: dict[str, Problem] = {}
    configs = []
    output = document.value(("training", "output_dir"))
    for choice in itertools.product(*(range(len(values)) for values in lists.values())):
        one = deepcopy(document)
        settings, parts = {}, []
        for (place, values), at in zip(lists.items(), choice, strict=True):
            settings[_key(place)] = values[at]
            parts.append(_part(_key(place), values[at], at))
            _set(one, tuple(_key(place).split(".")), values[at], document.place((*place, at)))
        if isinstance(output, str):
            _set(one, ("training", "output_dir"), f"{output}/{'_'.join(parts)}", document.place(("training",)))
        config, found = check(one)
        problems |= {str(each): each for each in found}
        if config is not None and not found:
            made.append((settings, parts))
            configs.append(config)
    if problems:
        raise ConfigError([*problems.values()])
    names = [Path(config.training.output_dir).name for config in configs]
    together = zip(names, made, configs, strict=True)
    found = [Combination(name, settings, config) for name, (settings, _), config in together]
    return Sweep(Path(configs[0].training.output_dir).parent, found)


def _set(document: Document, path: tuple[str, ...], value: Any, where: str) -> None:
    section = document.values
    for key in path[:-1]:
        section = section.setdefault(key, {})
    document.forget(path)
    document.places[path] = where
    section[path[-1]] = value
    if not isinstance(value, dict | list):
        document.written[path] = str(value)


def _part(key: str, value: Any, at: int) -> str:
    """A setting in the name of a folder; lists and mappings by their number."""
    told = str(at + 1) if isinstance(value, dict | list) else f"{value:g}" if isinstance(value, float) else str(value)
    return f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9.+-]', '-', told)}"
