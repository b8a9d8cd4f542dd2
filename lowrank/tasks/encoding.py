"""Texts to tokens as a base was trained on them, with its marks of beginning, border and end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lowrank.data import Batch
from lowrank.data.reading.row_error import RowError


def _checked_text(value: Any, key: str) -> str:
    """The text of a row. RowError: it is none, or it is empty."""
    if not isinstance(value, str):
        raise RowError(f"{key!r} is not text but {value!r:.60}", 'Write it as text, in quotes: "3" and not 3.')
    if not value.strip():
        raise RowError(f"{key!r} is empty", "Write a text, or leave the row out.")
    return value


def encoded_text(
    text: Any, pair: Any, tokenizer: PreTrainedTokenizerBase, longest: int | None, key: str = "text"
) -> tuple[np.ndarray, int | None, bool]:
    """A text, or two of them.

    A tokenizer that writes nothing between two texts is given a blank line.

    Args:
        text: Of the row.
        pair: The second text, None for none.
        tokenizer: The base's.
        longest: What is longer is cut to so many tokens, the longer of two texts first; None: nothing is.
        key: Of the row, where the text stands.

    Returns:
        Ids (n,) int32; the first token of the second text where the base has types of tokens; whether it was cut.

    Raises:
        RowError: one of them is no text, or empty, or gives no token.
    """
    first = _checked_text(text, key)
    second = None if pair is None else _checked_text(pair, "text_pair")
    if second is not None and tokenizer.sep_token_id is None:
        first, second = f"{first}\n\n{second}", None
    found = tokenizer(first, second, truncation=False)
    ids, types = found["input_ids"], found.get("token_type_ids")
    cut = longest is not None and len(ids) > longest
    if cut:
        found = tokenizer(first, second, truncation="longest_first" if second else True, max_length=longest)
        ids, types = found["input_ids"], found.get("token_type_ids")
    if not ids:
        raise RowError("the text gives no token")
    return np.array(ids, dtype=np.int32), (types.index(1) if types and 1 in types else None), cut


def encoded_words(
    words: Any, tokenizer: PreTrainedTokenizerBase, longest: int | None
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Words with a blank between them, as a text.

    Args:
        words: Of the row.
        tokenizer: The base's.
        longest: Where the tokens are cut; None: nowhere.

    Returns:
        Ids (n,) int32; the first token of each word, (n,) bool; whether it was cut.

    Raises:
        RowError: they are no words, or the tokenizer joins two of them, or no word is left.
    """
    if not isinstance(words, list) or not words:
        raise RowError("the row has no tokens", 'Expected {"tokens": ["a", "word", ...]}.')
    for number, word in enumerate(words, start=1):
        if not isinstance(word, str) or not word.strip():
            raise RowError(f"token {number} is {word!r:.40}", "Write a word.")
    starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
    found = tokenizer(" ".join(words), return_offsets_mapping=True, truncation=longest is not None, max_length=longest)
    ends = np.array([end for _, end in found["offset_mapping"]])
    whole = len(ends) if longest is None else len(tokenizer(" ".join(words))["input_ids"])
    firsts = [int(np.argmax(ends > start)) for start in starts.tolist() if ends.max(initial=0) > start]
    if len(set(firsts)) < len(firsts):
        raise RowError("the tokenizer makes one token of two words", "Write them as one.")
    if not firsts:
        raise RowError("no word is left of the row")
    marks = np.zeros(len(ends), dtype=bool)
    marks[firsts] = True
    return np.array(found["input_ids"], dtype=np.int32), marks, whole > len(ends)


def token_types(batch: Batch, second_from: Sequence[int | None]) -> dict[str, torch.Tensor]:
    """`token_type_ids` (b, n) where a row has a second text that the base tells from the first; else nothing."""
    if all(start is None for start in second_from):
        return {}
    types = torch.zeros_like(batch.input_ids)
    for row, start in enumerate(second_from):
        if start is not None:
            types[row, start:] = 1
    assert batch.attention_mask is not None
    return {"token_type_ids": types * batch.attention_mask}
