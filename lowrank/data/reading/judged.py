"""What a row says of answers to one prompt: which are wanted, and which are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowrank.data.reading.conversation import Conversation, Plain, Preference
from lowrank.data.reading.formats import detect, read_row
from lowrank.data.reading.row_error import RowError

_LABEL = "label"
_SAID = {1: True, 0: False, "true": True, "false": False}
"""What a label can be; true and false are 1 and 0 to a table."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Answers to one prompt.

    Attributes:
        answers: Each behind the prompt; of a pair the chosen one, then what was rejected.
        liked: Whether each is wanted.
        margin: By how much the chosen one is better, where the row says so.
    """

    answers: tuple[Conversation | Plain, ...]
    liked: tuple[bool, ...]
    margin: float | None = None


def judged(row: Mapping[str, Any], form: str | None, has_template: bool, *, paired: bool) -> Judged:
    """What a row of preferences says.

    Args:
        row: chosen and rejected; or, where answers need no pair, an answer and its `label`.
        form: A key of `FORMATS`, or None for the one that its keys tell.
        has_template: Whether the tokenizer has a chat template.
        paired: Whether answers are learned from in pairs.

    Raises:
        RowError: the row does not say so, or an answer is empty.
    """
    if paired or _LABEL not in row:
        content = read_row(row, form or detect(row), has_template)
        if not isinstance(content, Preference):
            wanted = "chosen and rejected" if paired else 'a label ("label": true or false), or chosen and rejected'
            raise RowError(f"the row has no {wanted}: {', '.join(map(repr, row))}", "Preferences are learned from it.")
        return Judged(content.answers, (True, *[False] * (len(content.answers) - 1)), content.margin)
    others = unlabelled(row)
    content = read_row(others, form or detect(others), has_template)
    if isinstance(content, Preference):
        raise RowError("the row has chosen and rejected, and a label", "Leave the label out.")
    if content.is_empty:
        raise RowError("the answer is empty", "Write it, or remove the row.")
    return Judged((content,), (_liked(row[_LABEL]),))


def unlabelled(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row without its label, for whoever asks only what is said in it."""
    return {key: value for key, value in row.items() if key != _LABEL}


def _liked(value: Any) -> bool:
    said = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(said, bool | int | str) or said not in _SAID:
        raise RowError(f"the label is {value!r}", "It says whether the answer is wanted: true or false.")
    return _SAID[said]
