"""The rows of tasks other than the next token: what they look like, and by which keys a task is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TaskFormat:
    """The rows of one task.

    Attributes:
        expects: What a row looks like, for error messages.
        needs: The keys that a row must have; where it has them all, its task is plain.
        optional: Further keys that it may have.
        by_name: Whether only a config that names the task has it: its rows may mean something else.
    """

    expects: str
    needs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    by_name: bool = False

    @property
    def keys(self) -> list[str]:
        """All keys of its own."""
        return [*self.needs, *self.optional]


TASK_FORMATS: dict[str, TaskFormat] = {
    "sequence_classification": TaskFormat(
        '{"text": ..., "label": ...}, with "text_pair" where a label is about two texts',
        ("text", "label"),
        ("text_pair",),
    ),
    "token_classification": TaskFormat(
        '{"tokens": ["a", "word", ...], "tags": ["O", "B-PER", ...]}', ("tokens", "tags"), ("text",)
    ),
    "embedding": TaskFormat(
        '{"anchor": ..., "positive": ...}, with "negative" where one is known', ("anchor", "positive"), ("negative",)
    ),
    "reward": TaskFormat(
        '{"chosen": ..., "rejected": ...}, texts or messages, with "prompt" where it stands apart',
        ("chosen", "rejected"),
        ("prompt", "margin"),
        by_name=True,
    ),
}
"""By the name of the task; the config reads the names here, so nothing loads torch."""


def task_of(row: Mapping[str, Any], named: str | None = None) -> str | None:
    """The task whose keys a row has, all of them with values, the named one before others; None: there is none."""
    for name, form in sorted(TASK_FORMATS.items(), key=lambda item: item[0] != named):
        if (name == named or not form.by_name) and all(row.get(key) is not None for key in form.needs):
            return name
    return None
