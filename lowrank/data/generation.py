"""Rows as questions: what to give the model, and what it should answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowrank.data.align import text_prefix
from lowrank.data.conversation import Conversation, Plain, Preference
from lowrank.data.formats import detect, read_row
from lowrank.data.rowerror import RowError
from lowrank.data.template import ChatTemplate
from lowrank.errors import InputError


def prompt_of(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, format: str | None = None) -> list[int]:
    """Token ids of a row up to where its last answer begins, the assistant's header included.

    Raises:
        InputError: the row fits no format or has no answer.
    """
    try:
        content = _content(row, tokenizer, format)
        if isinstance(content, Plain):
            ids, prefix = _ids(content.prompt, tokenizer), text_prefix(tokenizer)
            return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]
        before = content.messages[: _last_answer(content)]
        return _ids(ChatTemplate(tokenizer).prompts([before], content.tools)[0], tokenizer)
    except RowError as error:
        raise InputError(error.what, fix=error.fix) from None


def answer_of(row: Mapping[str, Any], format: str | None = None) -> str:
    """The text of a row's last answer: what the model should have said after `prompt_of`.

    Raises:
        InputError: the row fits no format or has no answer.
    """
    try:
        content = _content(row, None, format)
        if isinstance(content, Plain):
            return content.completion
        return content.messages[_last_answer(content)].get("content", "")
    except RowError as error:
        raise InputError(error.what, fix=error.fix) from None


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _content(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, format: str | None
) -> Conversation | Plain:
    has_template = tokenizer is None or tokenizer.chat_template is not None
    content = read_row(row, format or detect(row), has_template)
    return content.chosen if isinstance(content, Preference) else content


def _last_answer(content: Conversation) -> int:
    answers = [at for at, message in enumerate(content.messages) if message["role"] == "assistant"]
    if not answers:
        raise RowError("the conversation has no assistant turn")
    return answers[-1]
