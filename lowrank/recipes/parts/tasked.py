"""Which task a config is about: the one that it names, or the one that its rows make plain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank.config import RunConfig
from lowrank.config.contradictions import contradictions
from lowrank.config.sections import DataSection, SourceSection
from lowrank.data.reading.formats import is_blank
from lowrank.data.reading.sources import LOOKED_AT, Sources, open_sources
from lowrank.data.reading.task_formats import TASK_FORMATS, task_of
from lowrank.errors import InputError
from lowrank.recipes.parts.batches import sources_of
from lowrank.tasks.kinds_of_task import CAUSAL_LM


def with_task(config: RunConfig) -> RunConfig:
    """The config with its task; as it was where that is the next token.

    Raises:
        InputError: the task that is named is not that of the rows, or does not go with what else the config says.
    """
    named = config.model.task
    if named == CAUSAL_LM or (named is None and (config.preferring or not _may_be_found(config.data))):
        return config
    first, found = _plainest(sources_of(config.data.train), config.data.columns, config.data.transform, named)
    if found is None and named is None:
        _refuse_contradictions(_with(config, CAUSAL_LM))
        return config
    if first is not None and named not in (None, found):
        raise InputError(
            f"the row has {', '.join(_filled(first[0]))}, and model.task is {named}",
            where=first[1],
            fix=f"Expected {TASK_FORMATS[str(named)].expects}. Columns of other names are given by data.columns.",
        )
    tasked = _with(config, named or str(found))
    _refuse_contradictions(tasked)
    data = tasked.data.model_copy(update={"packing": False})
    return tasked.model_copy(update={"data": data})


def _may_be_found(data: DataSection) -> bool:
    """Whether the config leaves it to the rows: a format that is named says what they are, and a stream is text."""
    sources = data.train if isinstance(data.train, list) else [data.train]
    named = (data.format, *(one.format for one in sources if isinstance(one, SourceSection)))
    return not data.streaming and all(one is None for one in named)


def _with(config: RunConfig, task: str) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"task": task})})


def _refuse_contradictions(config: RunConfig) -> None:
    found = list(contradictions(config))
    if found:
        raise InputError("\n".join(map(str, found)), fix="The task was found by the rows; model.task names another.")


def task_of_rows(path: str) -> str | None:
    """The task that the first rows of a file or a folder make plain; None for the next token."""
    return _plainest(path)[1]


def _filled(row: Mapping[str, Any]) -> list[str]:
    """The keys that have a value."""
    return [repr(key) for key, value in row.items() if value is not None]


def _plainest(
    sources: Sources, columns: Mapping[str, str] | None = None, transform: str | None = None, named: str | None = None
) -> tuple[tuple[Mapping[str, Any], str] | None, str | None]:
    """The first row whose task is plain or the named one, where it is, and the task: a label may be missing in the rows
    before. Where there is none, the first that is not empty (None where all are), and None."""
    first: tuple[Mapping[str, Any], str] | None = None
    rows = open_sources(sources, None, columns, transform)[0].rows
    for index in range(min(len(rows), LOOKED_AT)):
        try:
            row = rows[index]
        except InputError:  # told when all rows are read
            continue
        if is_blank(row):
            continue
        if (task := task_of(row, named)) is not None:
            return (row, rows.where(index)), task
        first = first or (row, rows.where(index))
    return first, None
