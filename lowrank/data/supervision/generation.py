"""Rows as questions: what to give the model, and what it should answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowrank.data.examples.example import Examples
from lowrank.data.reading.conversation import Conversation, Plain, Preference
from lowrank.data.reading.formats import Content, detect, read_row
from lowrank.data.reading.judged import unlabelled
from lowrank.data.reading.row_error import RowError
from lowrank.data.reading.sources import Joined
from lowrank.data.supervision.row_options import Options
from lowrank.data.supervision.tokenise import Tokeniser
from lowrank.errors import InputError

_NO_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class Question:
    """The last trained turn of a row, as it is trained.

    Attributes:
        prompt: Token ids of all that stands before it, the assistant's header included.
        answer: Its own token ids, through the one that ends it.
        turns: (role, text) of what stands before it, for a person to read.
        row: Which of its set's rows it is; None of a row that is in no set.
    """

    prompt: list[int]
    answer: list[int]
    turns: tuple[tuple[str, str], ...] = ()
    row: int | None = None


def questions_of(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, format: str | None = None, today: str | None = None
) -> list[Question]:
    """One question for each row of a set, whole, however many examples the row gave and however often it is repeated.

    Under `train_on: all` a row may teach no answer (its assistant's turns are all marked, or there is none); it asks
    nothing.

    Args:
        examples: The set, of rows that can be trained on.
        tokenizer: With the chat template that they were made with.
        format: A key of `FORMATS`, or None for the one that each source has been found to have.
        today: The date (2026-11-26) for chat templates that write the day's; None: the day it is.

    Raises:
        InputError: no row asks anything.
    """
    tokeniser = _tokeniser(tokenizer, examples.train_on, today)
    rows = dict.fromkeys(examples.table.example_rows[examples.order].tolist())
    formats = {row: format or _format_of(examples, row) for row in rows}
    if examples.train_on == "all":
        formats = {row: form for row, form in formats.items() if _teaches_an_answer(examples.rows[row], form)}
    if not formats:
        raise InputError(
            "no row has an answer of an assistant that carries loss, so there is nothing to ask",
            where=examples.rows.name,
            fix="Take other rows, or do not generate answers (training.predict_with_generate: false).",
        )
    return [
        replace(_question(tokeniser, examples.rows[row], form, examples.rows.where(row)), row=row)
        for row, form in formats.items()
    ]


def _format_of(examples: Examples, row: int) -> str:
    rows = examples.rows
    return rows.formats(row, row + 1)[0] if isinstance(rows, Joined) else detect(rows[row])


def _teaches_an_answer(row: Mapping[str, Any], format: str) -> bool:
    content = read_row(row, format, True)
    if not isinstance(content, Conversation):
        return True
    turns = zip(content.messages, content.train, strict=True)
    return any(message["role"] == "assistant" and train for message, train in turns)


def prompt_of(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, format: str | None = None) -> list[int]:
    """Token ids of a row up to where its last answer begins, the assistant's header included.

    Raises:
        InputError: the row fits no format or has no answer.
    """
    return _question(_tokeniser(tokenizer, "assistant", None), row, format, None).prompt


def answer_of(row: Mapping[str, Any], format: str | None = None) -> str:
    """The text of a row's last answer, without what a chat template adds to it.

    Raises:
        InputError: the row fits no format or has no answer.
    """
    try:
        content = read_row(row, format or detect(row), True)
        content = content.chosen if isinstance(content, Preference) else content
        if isinstance(content, Plain):
            return content.completion
        return content.messages[_last_answer(content)].get("content", "")
    except RowError as error:
        raise InputError(error.what, fix=error.fix) from None


def _tokeniser(tokenizer: PreTrainedTokenizerBase, train_on: str, today: str | None) -> Tokeniser:
    asked = "assistant" if train_on == "all" else train_on  # under all, a conversation is one stretch
    return Tokeniser(tokenizer, Options(asked, _NO_LIMIT, "error", today=today))


def _question(tokeniser: Tokeniser, row: Mapping[str, Any], format: str | None, where: str | None) -> Question:
    try:
        row = unlabelled(row)
        form = format or detect(row)
        return Question(*tokeniser.last_turn(row, form), _turns(read_row(row, form, True)))
    except RowError as error:
        raise InputError(error.what, where=where, fix=error.fix) from None


def _turns(content: Content) -> tuple[tuple[str, str], ...]:
    content = content.chosen if isinstance(content, Preference) else content
    if isinstance(content, Plain):
        return (("prompt", content.prompt),)
    before = content.messages[: _last_answer(content)]
    return tuple((message["role"], _said(message)) for message in before)


def _said(message: Mapping[str, Any]) -> str:
    text = message.get("content") or ""
    said = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or []]
    return "\n".join(part for part in [said, *calls] if part)


def _last_answer(content: Conversation) -> int:
    answers = [at for at, message in enumerate(content.messages) if message["role"] == "assistant"]
    if not answers:
        raise RowError("the conversation has no assistant turn")
    return answers[-1]
