"""From a document to a `RunConfig`, or to every mistake in it at once."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pydantic import ValidationError

from lowrank.config.contradictions import ContradictionsError, without_effect
from lowrank.config.document import Document, KeyPath, Problem
from lowrank.config.findings import Found, contradiction, problems, traps
from lowrank.config.keys import SECTIONS
from lowrank.config.run_config import RunConfig


def check(document: Document) -> tuple[RunConfig | None, list[Problem]]:
    """The config if it is one, and all that is wrong, in the order of the file's lines, overrides last."""
    config, found = None, traps(document)
    try:
        config = RunConfig.model_validate(document.values)
    except ValidationError as error:
        found = problems(document, error) | found
        found |= _hidden(document, found)
    else:
        written = (contradiction(document, idle) for idle in without_effect(config))
        found |= {path: problem for path, problem in written if path in document.places}
    unread = {problem.key for problem in document.problems}
    mistakes = [*document.problems, *(problem for problem in found.values() if problem.key not in unread)]
    return config, sorted(mistakes, key=lambda problem: _line(problem.where))


def _hidden(document: Document, found: Found) -> Found:
    """The contradictions between sections, which pydantic looks for only where nothing else is wrong."""
    try:
        RunConfig.model_validate(_without(document.values, found))
    except ValidationError as error:
        causes = [detail.get("ctx", {}).get("error") for detail in error.errors()]
        all_of_them = [one for cause in causes if isinstance(cause, ContradictionsError) for one in cause.found]
        wrong = {path[:2] for path in found} | {path[:1] for path in found if len(path) == 1}
        paths = [(one, [tuple(key.split(".")) for key in one.keys]) for one in all_of_them]
        clear = [one for one, keys in paths if not any(key in wrong or key[:1] in wrong for key in keys)]
        return dict(contradiction(document, one) for one in clear)
    return {}


def _without(values: dict[str, Any], found: Found) -> dict[str, Any]:
    """The values without what is wrong, something in the place of what must be there."""
    left = deepcopy(values)
    for path in found:
        _remove(left, path[:2])
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            if field.is_required():
                left.setdefault(section, {}).setdefault(name, "-")
    return left


def _remove(values: dict[str, Any], path: KeyPath) -> None:
    section = values.get(str(path[0]))
    if len(path) == 1 or not isinstance(section, dict):
        values.pop(str(path[0]), None)
    else:
        section.pop(path[1], None)


def _line(where: str) -> tuple[int, str]:
    number = where.rpartition(":")[2]
    return (int(number), "") if number.isdigit() and not where.startswith("--set") else (10**9, where)
