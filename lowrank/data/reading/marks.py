"""Marks that say what carries loss: those of a message are followed, those of a whole row are refused by their name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.data.reading.row_error import RowError

MARKS = ("train", "loss", "weight")

# Looked for at the beginning of a word of a key: is_trained, lossMask; not gloss, not finish_reason.
_LIKE_A_MARK = re.compile(r"(?:^|[_\W])(?:un)?(?:train|loss|mask|weight|learn|supervis|ignore)")
# What is a mark where its value is yes or no, and anything else (a class, a place) where it is not.
_LIKE_A_CHOICE = re.compile(r"(?:^|[_\W])(?:skip|exclude|label|target|grad|backprop)")
_LEFT_OUT = re.compile(r"(?:^|[_\W])(?:mask|ignor|un(?:train|learn|supervis))")
_WEIGHTS = re.compile(r"(?:^|[_\W])weights?$")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
_WORDS_OF_TRUTH = {"true": True, "false": False}


def words_of(key: str) -> str:
    """A key in lower case, its words apart."""
    return _HUMP.sub("_", key).lower()


def is_like_a_mark(key: str, value: Any) -> bool:
    """Whether what a message says under a key that is not known may say what carries loss."""
    words = words_of(key)
    return bool(_LIKE_A_MARK.search(words)) or (isinstance(value, bool) and bool(_LIKE_A_CHOICE.search(words)))


def mark_of(key: str, value: Any, at: int) -> bool:
    """Whether a mark of `MARKS` lets message `at` carry loss.

    Raises:
        RowError: its value is not one of those that are followed.
    """
    if key == "weight" and isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if key != "weight" and isinstance(value, bool):
        return value
    allowed = "It is 0 or 1; weights between are not trained." if key == "weight" else "It is true or false."
    raise RowError(f'message {at + 1}: "{key}" is {value!r}', allowed)


def refuse_marks(row: Mapping[str, Any]) -> None:
    """Raises RowError for a row that is marked as a whole, or turn by turn in a list of its own.

    Numbers that a row keeps of itself (the loss that a model had on it, a step of training) are no marks.
    """
    if row.get("label") is False:
        raise RowError(
            "the row's answer is labelled false: it is not wanted, and training.objective is sft",
            "Set training.objective: kto, which learns from wanted and unwanted answers, or leave such rows out.",
        )
    fix = 'Leave it out, or say by message what carries loss: "train": true or false. A source as a whole has a weight.'
    for key, value in row.items():
        words = words_of(str(key))
        if not _LIKE_A_MARK.search(words):
            continue
        said = _WORDS_OF_TRUTH.get(value.strip().lower(), value) if isinstance(value, str) else value
        if isinstance(said, bool) and said is bool(_LEFT_OUT.search(words)):
            raise RowError(f"the row as a whole is marked {key!r}: {str(said).lower()}, which is not read", fix)
        if _is_list_of_marks(said) or (_WEIGHTS.search(words) and not _is_one(said)):
            raise RowError(f"the row has the key {key!r}, which is not read", fix)


def _is_list_of_marks(value: Any) -> bool:
    numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else []
    return bool(numbers) and all(isinstance(each, int | float) and 0 <= each <= 1 for each in numbers)


def _is_one(value: Any) -> bool:
    try:
        return value in (None, "", [], {}) or float(value) == 1
    except (TypeError, ValueError):
        return False
