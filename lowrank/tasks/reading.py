"""Rows of a task as examples: read, encoded, counted; what cannot be used is told with its file and line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from lowrank.data import Examples
from lowrank.data.examples.token_table import Cut, Outcome, TokenTable
from lowrank.data.loading.bad_rows import LISTED, MOST, refuse_many
from lowrank.data.reading.columns import check_columns
from lowrank.data.reading.formats import is_blank
from lowrank.data.reading.row_error import RowError
from lowrank.data.reading.rows import as_json
from lowrank.data.reading.sources import Joined, Sources, open_sources
from lowrank.errors import InputError

_AT_A_TIME = 1000


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as tokens.

    Attributes:
        ids: (n,) int32.
        marks: Which tokens a summand of the loss belongs to, (n,) bool; one at least.
        payload: What the task's batches need beside the tokens: the label, as the row has it, and its like.
        cut: Whether it was cut at the longest length.
        longest: Tokens of its longest text, where it has several; None: all of them.
    """

    ids: np.ndarray
    marks: np.ndarray
    payload: Any
    cut: bool
    longest: int | None = None


class Encoder(Protocol):
    """A row to tokens, as a task wants them."""

    def __call__(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Encoded:
        """One row; cut at `max_length`, where there is one. RowError: it cannot be used."""
        ...


@dataclass(slots=True)
class _Gathered:
    """What has come out of the rows so far."""

    encoded: list[Encoded] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    bad: list[InputError] = field(default_factory=list)
    reasons: list[tuple[int, str]] = field(default_factory=list)


def read_task_rows(
    sources: Sources,
    encode: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    too_long: str,
    bad_rows: str,
    columns: Mapping[str, str] | None,
    transform: str | None = None,
    max_rows: int | None,
) -> Examples:
    """Reads and encodes rows.

    Args:
        sources: As `load_examples` takes them.
        encode: The task's.
        tokenizer: The base's.
        max_length: The most tokens in an example.
        too_long: What becomes of a longer one: `error`, `drop` or `truncate`.
        bad_rows: `error`, or `skip` those that cannot be used, if they are few.
        columns: Where the keys of the task's rows are found.
        transform: As `load_examples` takes it.
        max_rows: Read only so many rows.

    Raises:
        InputError: names the file and line of what cannot be used.
    """
    rows = Joined(open_sources(sources, None, columns, transform), max_rows)
    if any(part.weight is not None for part in rows.parts):
        raise InputError("rows of a task are not mixed by weights", where="data.train", fix="Leave the weights out.")
    for part in rows.parts:
        check_columns(part.rows)
    found = _Gathered()
    cut_at = max_length if too_long == "truncate" else None
    for begin in range(0, len(rows), _AT_A_TIME):
        end = min(begin + _AT_A_TIME, len(rows))
        for at, row in enumerate(rows.read(begin, end), start=begin):
            _take(found, at, row, rows, encode, tokenizer, cut_at, max_length)
    _refuse_bad(found, rows, bad_rows)
    _refuse_long(found, rows, too_long, max_length)
    if not found.encoded:
        raise InputError("no row is left to learn from", where=rows.name)
    payloads = [one.payload for one in found.encoded]
    return Examples(_table(found), rows, train_on="all", reasons=found.reasons, payloads=payloads)


def _take(
    found: _Gathered,
    at: int,
    row: Mapping[str, Any],
    rows: Joined,
    encode: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    cut_at: int | None,
    max_length: int,
) -> None:
    """Adds a row, or what has become of it."""
    found.keys.append(_digest(json.dumps(row, sort_keys=True, default=as_json).encode(errors="replace")))
    found.lengths.append(0)
    if is_blank(row):
        found.outcomes.append(Outcome.EMPTY)
        return
    try:
        one = encode(row, tokenizer, cut_at)
    except RowError as error:
        found.outcomes.append(Outcome.BAD)
        found.bad.append(InputError(error.what, where=rows.where(at), fix=error.fix))
        if len(found.reasons) < LISTED:
            found.reasons.append((at, str(found.bad[-1]).splitlines()[0]))
        return
    found.lengths[-1] = one.longest or len(one.ids)
    if found.lengths[-1] > max_length:
        found.outcomes.append(Outcome.TOO_LONG)
        return
    found.outcomes.append(Outcome.KEPT)
    found.encoded.append(one)
    found.rows.append(at)


def _refuse_bad(found: _Gathered, rows: Joined, bad_rows: str) -> None:
    """Raises InputError for rows that cannot be used, unless they are few and to be skipped."""
    if not found.bad:
        return
    if bad_rows == "skip":
        refuse_many(len(found.bad), len(rows), rows.name, [why for _, why in found.reasons])
        return
    first, count = found.bad[0], len(found.bad)
    more = f" (and {count - 1:,} more of {len(rows):,} rows cannot be used)" if count > 1 else ""
    skip = "To leave such rows out, set data.bad_rows: skip." if count <= MOST * len(rows) else None
    fix = "\n".join(part for part in (first.fix, skip) if part)
    raise InputError(first.what + more, where=first.where, fix=fix or None)


def _refuse_long(found: _Gathered, rows: Joined, too_long: str, max_length: int) -> None:
    over = [at for at, outcome in enumerate(found.outcomes) if outcome == Outcome.TOO_LONG]
    if over and too_long == "error":
        longest = max(found.lengths)
        raise InputError(
            f"{len(over)} of {len(rows)} rows are longer than data.max_length = {max_length} tokens; the longest has "
            f"{longest}",
            where=rows.where(over[0]),
            fix="Raise data.max_length, or set data.too_long to drop or truncate.",
        )


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _table(found: _Gathered) -> TokenTable:
    encoded, count = found.encoded, len(found.outcomes)
    sizes = [len(one.ids) for one in encoded]
    taught = [one.ids.tobytes() + one.marks.tobytes() + repr(one.payload).encode() for one in encoded]
    return TokenTable(
        ids=np.concatenate([one.ids for one in encoded]).astype(np.int32),
        supervised=np.concatenate([one.marks for one in encoded]),
        starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        example_rows=np.array(found.rows, dtype=np.int64),
        cuts=np.array([Cut.TRUNCATED if one.cut else Cut.WHOLE for one in encoded], dtype=np.uint8),
        digests=np.array(list(map(_digest, taught)), dtype=np.uint64),
        row_keys=np.array(found.keys, dtype=np.uint64),
        outcomes=np.array(found.outcomes, dtype=np.uint8),
        control_text=np.zeros(count, dtype=bool),
        row_lengths=np.array(found.lengths, dtype=np.int64),
        uneven=np.zeros(count, dtype=bool),
        masked_turns=np.zeros(count, dtype=np.int64),
        unasked=np.zeros(count, dtype=bool),
    )
