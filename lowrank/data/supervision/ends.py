"""The tokens that end answers: those with which the turns end that carry loss."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from lowrank.data.examples.example import Examples
from lowrank.data.reading.row_error import RowError
from lowrank.data.supervision.check_supervision import ends_of_turns
from lowrank.data.supervision.template import ChatTemplate, special_tokens


def end_tokens(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end trained turns, the most frequent first.

    Under `train_on: all` a conversation is one run of tokens; how its turns end is then asked of the template.
    """
    found, counts = np.unique(ends_of_turns(examples, tokenizer), return_counts=True)
    ends = found[np.argsort(-counts, kind="stable")].tolist()
    if examples.train_on == "all" and tokenizer.chat_template is not None:
        mark = _end_of_turn(tokenizer)
        known = mark is not None and mark not in ends
        trained = known and bool(examples.table.supervised[examples.table.ids == mark].any())
        ends = [mark, *ends] if trained else ends
    return ends


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the template closes an answer with; None where there is none."""
    template = ChatTemplate(tokenizer)
    try:
        mark = template.end_of_turn
    except RowError:
        return None
    return special_tokens(tokenizer)[mark] if mark else None
