"""Rows with a better and a worse answer, taken apart: the prompt, which may be told by what the answers have in common.

What is accepted is what data sets of preferences hold: a prompt and answers, both texts or both lists of messages;
conversations that begin alike and end differently; texts that do (hh-rlhf); several rejected answers; a margin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.data.reading.messages import STYLES, parsed
from lowrank.data.reading.row_error import RowError

Answers = list[tuple[str, Any]]
"""Each with the key that it stands under."""


def prompt_and_answers(row: Mapping[str, Any]) -> tuple[Any, Answers]:
    """The prompt, a text or a list of messages, and what follows it: the chosen answer, then each of the rejected.

    Raises:
        RowError: there is no rejected answer, or prompt and answers do not fit together.
    """
    chosen, rejected = _read(row["chosen"]), _several(_read(row["rejected"]))
    if not rejected:
        raise RowError("there is no rejected answer", "Give one, or a list of several.")
    values = [chosen, *rejected]
    prompt = _read(row.get("prompt"))
    if prompt in (None, []):  # an empty text is a prompt: answers that stand alone
        prompt, values = _parted(values)
    elif isinstance(prompt, str) and all(isinstance(value, list) for value in values):
        said, (prompt, values) = prompt, _parted(values)
        _refuse_another_prompt(said, prompt)
    elif isinstance(prompt, list) and all(_begins_with(value, prompt) for value in values):
        values = [value[len(prompt) :] for value in values]  # the prompt is written again in each of them
    return prompt, list(zip(("chosen", *["rejected"] * len(rejected)), values, strict=True))


def margin_of(row: Mapping[str, Any]) -> float | None:
    """By how much the chosen answer is better; None where the row does not say.

    Raises:
        RowError: it is no number.
    """
    value = row.get("margin")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"the margin is {value!r}, not a number", "Write how much better the chosen answer is: 0.5.")
    return float(value)


def _read(value: Any) -> Any:
    """The value; messages that are given as JSON text as what they stand for (another JSON text is a text)."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        found = parsed(value, "the messages")
    except RowError:
        return value
    are_messages = isinstance(found, list) and all(isinstance(one, Mapping) and STYLES.keys() & one for one in found)
    return found if are_messages else value


def _several(rejected: Any) -> list[Any]:
    """Each of the rejected answers: one may stand for itself, or several in a list."""
    is_list = isinstance(rejected, Sequence) and not isinstance(rejected, str)
    if is_list and not (rejected and isinstance(rejected[0], Mapping)):
        return [_read(one) for one in rejected]
    return [rejected]


def _parted(values: list[Any]) -> tuple[Any, list[Any]]:
    """What all begin with, and the rest of each.

    Raises:
        RowError: they are neither all texts nor all lists of messages, or have nothing in common.
    """
    as_texts = all(isinstance(value, str) for value in values)
    if not as_texts and not all(isinstance(value, list) for value in values):
        raise RowError("chosen and rejected are neither all text nor all lists of messages", "Write both in one way.")
    first = values[0]
    common = next(
        (at for at in range(len(first)) if any(at >= len(other) or other[at] != first[at] for other in values[1:])),
        len(first),
    )
    if as_texts and 0 < common < len(first) and first[common - 1] == " ":
        common -= 1  # a word's space goes with the word, as tokenizers have it
    if not common:
        raise RowError(
            "there is no prompt, and chosen and rejected have no beginning in common", "Give the key 'prompt'."
        )
    return first[:common], [value[common:] for value in values]


def _begins_with(value: Any, prompt: list[Any]) -> bool:
    return isinstance(value, list) and len(value) > len(prompt) and value[: len(prompt)] == prompt


def _refuse_another_prompt(said: str, messages: list[Any]) -> None:
    """Raises RowError where a text that is called the prompt is none of the messages that all answers begin with."""
    contents = [one.get(key) for one in messages if isinstance(one, Mapping) for key in STYLES.values()]
    if said.strip() not in [text.strip() for text in contents if isinstance(text, str)]:
        raise RowError(
            "the prompt is none of the messages that chosen and rejected begin with",
            "Leave the key 'prompt' out, or write it as these messages.",
        )
