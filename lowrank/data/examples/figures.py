"""The figures of a data set: what was read, what became of it, how long it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lowrank.data.examples.token_table import Cut, Outcome, TokenTable

HISTOGRAM_BINS = 12


@dataclass(frozen=True, slots=True)
class Lengths:
    """Example lengths in tokens: order statistics, and a histogram of `counts` between `edges`."""

    shortest: int
    median: int
    p95: int
    longest: int
    counts: list[int]
    edges: list[int]


@dataclass(frozen=True, slots=True)
class DataReport:
    """What was read and what became of it.

    Attributes:
        rows: Rows read.
        examples: Examples to train on, repeats of a mix included.
        tokens: Tokens in them.
        supervised_tokens: Tokens that carry loss.
        dropped: Rows left out because they are too long, or because a cut would have left them nothing to learn.
        truncated: Examples cut at `max_length`.
        duplicates: Examples whose tokens and mask have occurred before.
        empty: Rows left out because nothing stands in them.
        bad: Rows left out because they cannot be used.
        marked: Rows left out because they say of every turn that it carries no loss.
        split: Rows that became several examples, because the chat template rewrites earlier turns.
        control_text: Rows whose own text holds a special token: often a chat template applied twice.
        uneven: Rows in which a prompt and its answer are encoded apart, as a model that is asked sees them.
        masked_turns: Turns that were to carry loss, and cannot be aligned.
        unasked: Rows with a turn that does not begin where the template's generation prompt ends.
        lengths: Of the examples.
    """

    rows: int
    examples: int
    tokens: int
    supervised_tokens: int
    dropped: int
    truncated: int
    duplicates: int
    empty: int
    bad: int
    marked: int
    split: int
    control_text: int
    uneven: int
    masked_turns: int
    unasked: int
    lengths: Lengths

    @property
    def supervised_share(self) -> float:
        """Supervised tokens over all tokens."""
        return self.supervised_tokens / max(self.tokens, 1)

    def __str__(self) -> str:
        counts = {"truncated": self.truncated, "split": self.split, "dropped": self.dropped}
        counts |= {"duplicates": self.duplicates, "empty": self.empty}
        counts |= {"with no turn to train": self.marked, "left out as bad": self.bad}
        counts |= {"with a special token in their own text": self.control_text}
        counts |= {"whose prompt and answer are encoded apart": self.uneven}
        counts |= {"answered behind another header than the template asks with": self.unasked}
        counts |= {"turns left out of the loss, as they cannot be aligned": self.masked_turns}
        text = f"{self.rows:,} rows, {self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised"
        return ", ".join([text, *(f"{count:,} {what}" for what, count in counts.items() if count)])


@dataclass(slots=True)
class StreamCounts:
    """What has been read from a stream so far, over all passes; what a resumed run reads again is counted again.

    Duplicates are not among them: to know them is to remember every row.

    Attributes:
        rows: Rows read.
        examples: Examples they gave.
        truncated: Examples cut at `max_length`.
        dropped: Rows left out because they are too long, or because a cut would have left them nothing to learn.
        empty: Rows left out because nothing stands in them.
        marked: Rows left out because they say of every turn that it carries no loss.
        bad: Rows left out because they cannot be used.
        reasons: Why the first of those cannot.
    """

    rows: int = 0
    examples: int = 0
    truncated: int = 0
    dropped: int = 0
    empty: int = 0
    marked: int = 0
    bad: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, table: TokenTable) -> None:
        """Count the rows of one more table."""
        self.rows += len(table.outcomes)
        self.examples += len(table.cuts)
        self.truncated += int((table.cuts == Cut.TRUNCATED).sum())
        self.dropped += int((table.outcomes == Outcome.TOO_LONG).sum())
        self.empty += int((table.outcomes == Outcome.EMPTY).sum())
        self.marked += int((table.outcomes == Outcome.MARKED).sum())
        self.bad += int((table.outcomes == Outcome.BAD).sum())

    def __str__(self) -> str:
        counts = {"truncated": self.truncated, "dropped": self.dropped, "empty": self.empty}
        counts |= {"with no turn to train": self.marked, "bad": self.bad}
        told = [f"{self.rows:,} rows read", *(f"{count:,} {what}" for what, count in counts.items() if count)]
        return ", ".join(told)


def _lengths_of(lengths: np.ndarray) -> Lengths:
    """Order statistics and histogram of example lengths, (E,) integers."""
    if not len(lengths):
        return Lengths(0, 0, 0, 0, [], [])
    bins = min(HISTOGRAM_BINS, int(lengths.max() - lengths.min()) + 1)
    counts, edges = np.histogram(lengths, bins=bins)
    median, p95 = np.percentile(lengths, [50, 95])
    return Lengths(
        shortest=int(lengths.min()),
        median=round(float(median)),
        p95=round(float(p95)),
        longest=int(lengths.max()),
        counts=counts.tolist(),
        edges=np.round(edges).astype(int).tolist(),
    )


def report_of(table: TokenTable, order: np.ndarray, row_mask: np.ndarray) -> DataReport:
    """The figures of the examples in `order`, and of the rows in `row_mask`."""
    lengths = np.diff(table.starts)
    supervised = np.add.reduceat(table.supervised, table.starts[:-1], dtype=np.int64) if len(lengths) else lengths
    outcomes = table.outcomes[row_mask]
    unique = np.unique(order)
    per_row = np.bincount(table.example_rows[unique], minlength=len(table.outcomes))
    return DataReport(
        rows=int(row_mask.sum()),
        examples=len(order),
        tokens=int(lengths[order].sum()),
        supervised_tokens=int(supervised[order].sum()),
        dropped=int((outcomes == Outcome.TOO_LONG).sum()),
        truncated=int((table.cuts[order] == Cut.TRUNCATED).sum()),
        duplicates=len(unique) - len(np.unique(table.digests[unique])),
        empty=int((outcomes == Outcome.EMPTY).sum()),
        bad=int((outcomes == Outcome.BAD).sum()),
        marked=int((outcomes == Outcome.MARKED).sum()),
        split=int((per_row > 1).sum()),
        control_text=int(table.control_text[row_mask].sum()),
        uneven=int(table.uneven[row_mask].sum()),
        masked_turns=int(table.masked_turns[row_mask].sum()),
        unasked=int(table.unasked[row_mask].sum()),
        lengths=_lengths_of(lengths[order]),
    )
