"""All tokens of a data set as flat arrays, and what became of the rows that they came from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class Outcome(IntEnum):
    """What became of a row."""

    KEPT = 0
    EMPTY = 1
    TOO_LONG = 2
    BAD = 3
    MARKED = 4


class Cut(IntEnum):
    """Whether an example ends where its text does."""

    WHOLE = 0
    TRUNCATED = 1
    PIECE = 2


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Tokenised rows as flat arrays; T tokens, E examples, R rows that were read.

    Attributes:
        ids: Token ids of all examples one after another, (T,) int32.
        supervised: Which of them carry loss, (T,) bool.
        starts: Where each example starts in `ids`, and T at the end, (E + 1,) int64.
        example_rows: The row each example came from, (E,) int64, ascending.
        cuts: A `Cut` for each example, (E,) uint8: whether it was cut at `max_length`.
        digests: A hash of each example's tokens and mask, equal for duplicates, (E,) uint64.
        row_keys: A hash of each row's content, for splits that stay put when rows are added, (R,) uint64.
        outcomes: An `Outcome` for each row, (R,) uint8.
        control_text: Rows whose own text holds a special token of the tokenizer, (R,) bool.
        row_lengths: The longest example each row gave before anything was cut, in tokens, (R,) int64.
        uneven: Rows in which a prompt and its answer are encoded apart: as one text they are other tokens, (R,) bool.
        masked_turns: Turns of each row that were to carry loss and cannot be aligned, (R,) int64.
        unasked: Rows with a turn that does not begin where the template's generation prompt ends, (R,) bool.
    """

    ids: np.ndarray
    supervised: np.ndarray
    starts: np.ndarray
    example_rows: np.ndarray
    cuts: np.ndarray
    digests: np.ndarray
    row_keys: np.ndarray
    outcomes: np.ndarray
    control_text: np.ndarray
    row_lengths: np.ndarray
    uneven: np.ndarray
    masked_turns: np.ndarray
    unasked: np.ndarray
