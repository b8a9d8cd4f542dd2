"""What a run would train on, gathered for a person to look at; `preview_text` and `preview_html` draw it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lowrank.data.batches.batch_plan import BatchPlan
from lowrank.data.examples.example import Examples
from lowrank.data.examples.token_table import Outcome
from lowrank.data.preview.pack_tree import Branch, tree_of
from lowrank.data.preview.token_text import Piece, pieces
from lowrank.errors import InputError

WHY = {
    Outcome.EMPTY: "it is empty",
    Outcome.TOO_LONG: "it is too long",
    Outcome.BAD: "it cannot be used, and data.bad_rows is skip",
    Outcome.MARKED: "it says of every turn that it carries no loss",
}
"""Why a row gave no example."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One example: where it comes from, its tokens, and its figures."""

    place: str
    pieces: list[Piece]
    tokens: int
    supervised: int


@dataclass(frozen=True, slots=True)
class Preview:
    """Everything a preview shows.

    Attributes:
        heading: What the examples are: those of the first pack, of one row, or the first.
        shown: The examples; in a pack each is a segment.
        packed: Whether they are segments of one pack.
        left_out: How many more the pack or the row holds.
        figures: Labels and values of the table.
        histogram: Example lengths as (from, to, examples).
        reasons: Why the first rows that are left out as bad cannot be used.
        tree: Of a pack whose examples begin alike, its segments.
    """

    heading: str
    shown: list[Shown]
    packed: bool
    left_out: int
    figures: list[tuple[str, str]]
    histogram: list[tuple[int, int, int]]
    reasons: list[str]
    tree: list[Branch] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What each of the examples shown is: of a pack a segment, if they share none."""
        return "segment" if self.packed and not self.tree else "example"


def preview_of(
    plan: BatchPlan,
    tokenizer: PreTrainedTokenizerBase,
    *,
    row: int | None = None,
    count: int = 3,
    steps_per_epoch: int | None = None,
    of_stream: bool = False,
    expected: Callable[[Any], str] | None = None,
) -> Preview:
    """Gather what a preview shows.

    Args:
        plan: The batches of the run.
        tokenizer: What its tokens mean.
        row: Show this row (from 1, as in the file), or None: the beginning of the first batch.
        count: Examples to show.
        steps_per_epoch: Optimiser steps in the first epoch, where they are known.
        of_stream: The examples are those of a stream's first rows: there is no telling how long an epoch is.
        expected: Of a task, what a row's label is, from what belongs to the row beside its tokens.

    Raises:
        InputError: there is no such row, or nothing of it is trained on.
    """
    examples = plan.examples
    indices = plan.epoch(0)[0].rows if row is None else _of_row(examples, row)
    packed = plan.packing and row is None
    heading = f"row {row}" if row is not None else ("the first pack" if packed else "the first batch")
    heading += " of the stream's first rows" if of_stream and row is None else ""
    return Preview(
        heading=heading,
        shown=[_shown(examples, int(index), tokenizer, expected) for index in indices[:count]],
        packed=packed,
        left_out=max(0, len(indices) - count),
        figures=_figures(plan, steps_per_epoch, of_stream=of_stream),
        histogram=_histogram(examples.report.lengths.counts, examples.report.lengths.edges),
        reasons=examples.reasons,
        tree=tree_of(plan, plan.epoch(0)[0], tokenizer) if packed else [],
    )


def _of_row(examples: Examples, row: int) -> np.ndarray:
    rows = len(examples.table.outcomes)
    if not 1 <= row <= rows:
        raise InputError(f"there is no row {row}", where="--row", fix=f"Rows are 1 to {rows}.")
    found = np.flatnonzero(examples.table.example_rows[examples.order] == row - 1)
    if not len(found):
        why = WHY.get(examples.table.outcomes[row - 1], "it is set aside")
        raise InputError(f"nothing of row {row} is trained on: {why}", where="--row")
    return found


def _shown(
    examples: Examples, index: int, tokenizer: PreTrainedTokenizerBase, expected: Callable[[Any], str] | None
) -> Shown:
    ids, supervised = examples.arrays(index)
    place = examples.rows.where(int(examples.table.example_rows[examples.order[index]]))
    place = place if expected is None else f"{place}, label {expected(examples.payload(index))}"
    return Shown(place, pieces(ids.tolist(), supervised.tolist(), tokenizer), len(ids), int(supervised.sum()))


def _figures(plan: BatchPlan, steps_per_epoch: int | None, *, of_stream: bool) -> list[tuple[str, str]]:
    report = plan.examples.report
    lengths = report.lengths
    batches = "packs" if plan.packing else "batches"
    per_epoch = [(f"{batches} per epoch", f"{len(plan.epoch(0)):,}")]
    per_epoch += [] if steps_per_epoch is None else [("steps per epoch", f"{steps_per_epoch:,}")]
    return [
        ("rows looked at, the first of a stream" if of_stream else "rows", f"{report.rows:,}"),
        ("examples", f"{report.examples:,}"),
        ("tokens", f"{report.tokens:,}"),
        ("supervised", f"{report.supervised_tokens:,} ({report.supervised_share:.1%})"),
        ("length: min / median / p95 / max", _joined(lengths.shortest, lengths.median, lengths.p95, lengths.longest)),
        ("truncated", f"{report.truncated:,}"),
        ("dropped as too long", f"{report.dropped:,}"),
        ("empty rows", f"{report.empty:,}"),
        ("rows that say of every turn that it carries no loss", f"{report.marked:,}"),
        ("rows that cannot be used, left out", f"{report.bad:,}"),
        ("duplicates", f"{report.duplicates:,}"),
        ("rows with special tokens in their text", f"{report.control_text:,}"),
        ("rows whose prompt and answer are encoded apart", f"{report.uneven:,}"),
        ("turns left out of the loss: they cannot be aligned", f"{report.masked_turns:,}"),
        ("rows answered behind another header than is asked with", f"{report.unasked:,}"),
        ("rows split into several examples", f"{report.split:,}"),
        *([("tokens that go through the model", f"{plan.passing():,}")] if plan.shares else []),
        ("packing efficiency" if plan.packing else "tokens that are not padding", f"{plan.fill():.1%}"),
        *([] if of_stream else per_epoch),
    ]


def _joined(*numbers: int) -> str:
    return " / ".join(f"{number:,}" for number in numbers)


def _histogram(counts: Sequence[int], edges: Sequence[int]) -> list[tuple[int, int, int]]:
    return list(zip(edges[:-1], edges[1:], counts, strict=True))
