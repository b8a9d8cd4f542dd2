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
    text: Any, pair: Any, tokenizer: PreTrainedTokenizerBase, longest: int | None
) -> tuple[np.ndarray, int | None, bool]:
    """A text, or two of them.

    A tokenizer that writes nothing between two texts is given a blank line.

    Args:
        text: Of the row.
        pair: The second text, None for none.
        tokenizer: The base's.
        longest: What is longer is cut to so many tokens, the longer of two texts first; None: nothing is.

    Returns:
        Ids (n,) int32; the first token of the second text where the base has types of tokens; whether it was cut.

    Raises:
        RowError: one of them is no text, or empty, or gives no token.
    """
    first = _checked_text(text, "text")
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
