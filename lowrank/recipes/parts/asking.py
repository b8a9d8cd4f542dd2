"""What a model is given for a conversation, and how much it may answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowrank.data.reading.row_error import RowError
from lowrank.data.supervision.template import ChatTemplate
from lowrank.errors import InputError
from lowrank.models import positions_of, vocabulary_of
from lowrank.recipes.parts.talk import Messages


def prompt_ids(tokenizer: Any, asked: Sequence[Messages]) -> list[list[int]]:
    """What the model is given for each conversation, as in training: up to where its answer begins.

    Raises:
        InputError: the chat template refuses a conversation.
    """
    try:
        texts = ChatTemplate(tokenizer).prompts(asked, None)
    except RowError as error:
        raise InputError(error.what, fix="Without --system, if it is the system message that it refuses.") from None
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def room(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], asked: int) -> int:
    """How many tokens of the `asked` ones an answer may have, where the model has only so many positions.

    Raises:
        InputError: a prompt leaves no room for an answer, or holds a token that the embedding lacks.
    """
    vocabulary, positions = vocabulary_of(model), positions_of(model)
    largest, longest = max(token for prompt in prompts for token in prompt), max(map(len, prompts))
    if largest >= vocabulary:
        raise InputError(
            f"the prompt holds the token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and the model's "
            f"embedding has only {vocabulary} rows",
            fix="Take the tokenizer that belongs to the model.",
        )
    if positions is not None and longest >= positions:
        raise InputError(
            f"the prompt has {longest} tokens, and the model has only {positions} positions", fix="Ask for less."
        )
    return asked if positions is None else min(asked, positions - longest)
