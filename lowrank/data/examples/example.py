"""What a run trains on: examples, which are tokens and which of them carry loss.

All tokens of a data set lie in one `TokenTable` of flat arrays (in memory or mapped from the cache), so a hundred
thousand rows cost megabytes and a batch is cut out with slices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np

from lowrank.data.examples.figures import DataReport, report_of
from lowrank.data.examples.token_table import Cut, Outcome, TokenTable
from lowrank.data.reading.rows import RowList, Rows

IdsAndMask = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence of tokens.

    Attributes:
        input_ids: Token ids, as the model reads them.
        supervised: For each token, whether it carries loss. The first is never supervised: nothing predicts it.
    """

    input_ids: list[int]
    supervised: list[bool]


class Examples(Sequence[Example]):
    """A data set ready to train on: a sequence of `Example`, with its report and the rows it came from."""

    def __init__(
        self,
        table: TokenTable,
        rows: Rows,
        *,
        train_on: str,
        order: np.ndarray | None = None,
        row_mask: np.ndarray | None = None,
        reasons: Sequence[tuple[int, str]] = (),
        payloads: Sequence[Any] | None = None,
    ) -> None:
        """Look at a table through a selection.

        Args:
            table: The tokens.
            rows: The rows as they were read; `rows[i]` belongs to `table.outcomes[i]`.
            train_on: Which tokens were asked to carry loss (kept for `check_supervision`).
            order: The table's examples that are in this set, in this order; repeats are allowed. None: all of them.
            row_mask: The rows this set was made from, for the report's counts, (R,) bool. None: all of them.
            reasons: The first rows that could not be used, and why.
            payloads: What a task's batches need of each of the table's examples beside its tokens: its label.
        """
        self._reasons, self._payloads = reasons, payloads
        self.table, self.rows, self.train_on = table, rows, train_on
        self.order = np.arange(len(table.starts) - 1) if order is None else order
        self.row_mask = np.ones(len(table.outcomes), dtype=bool) if row_mask is None else row_mask
        self._report: DataReport | None = None

    @classmethod
    def of(cls, examples: Sequence[Example], train_on: str = "assistant") -> Examples:
        """A data set from examples made by hand; each is its own row `{"input_ids": ..., "supervised": ...}`."""
        starts = np.concatenate([[0], np.cumsum([len(e.input_ids) for e in examples])]).astype(np.int64)
        supervised = np.array([s for e in examples for s in e.supervised], dtype=bool)
        supervised[starts[:-1]] = False
        count = len(examples)
        table = TokenTable(
            ids=np.array([t for e in examples for t in e.input_ids], dtype=np.int32),
            supervised=supervised,
            starts=starts,
            example_rows=np.arange(count),
            cuts=np.full(count, Cut.WHOLE, dtype=np.uint8),
            digests=np.arange(count, dtype=np.uint64),
            row_keys=np.arange(count, dtype=np.uint64),
            outcomes=np.full(count, Outcome.KEPT, dtype=np.uint8),
            control_text=np.zeros(count, dtype=bool),
            row_lengths=np.diff(starts),
            uneven=np.zeros(count, dtype=bool),
            masked_turns=np.zeros(count, dtype=np.int64),
            unasked=np.zeros(count, dtype=bool),
        )
        rows = RowList([{"input_ids": e.input_ids, "supervised": e.supervised} for e in examples], "examples")
        return cls(table, rows, train_on=train_on)

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.select(self.order[index])
        ids, supervised = self.arrays(index)
        return Example(ids.tolist(), supervised.tolist())

    def arrays(self, index: int) -> IdsAndMask:
        """Token ids (n,) int32 and supervised (n,) bool of one example, as views that must not be written to."""
        at = self.order[index]
        part = slice(int(self.table.starts[at]), int(self.table.starts[at + 1]))
        return self.table.ids[part], self.table.supervised[part]

    @property
    def payloads(self) -> Sequence[Any]:
        """What a task's batches need beside tokens, of each of the table's examples."""
        assert self._payloads is not None, "these examples are of no task"
        return self._payloads

    def payload(self, index: int) -> Any:
        """What a task's batches need of one example beside its tokens."""
        return self.payloads[self.order[index]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens in each example, (E,) int64."""
        return np.diff(self.table.starts)[self.order]

    def row(self, index: int) -> Mapping[str, Any]:
        """The row, as it was read, that an example came from."""
        return self.rows[int(self.table.example_rows[self.order[index]])]

    @property
    def fingerprint(self) -> str:
        """Equal for the same examples in the same order."""
        return hashlib.blake2b(self.table.digests[self.order].tobytes(), digest_size=16).hexdigest()

    def select(self, order: np.ndarray, row_mask: np.ndarray | None = None) -> Examples:
        """The same table through another selection (indices into the table, not into this set)."""
        mask = self.row_mask if row_mask is None else row_mask
        return Examples(
            self.table,
            self.rows,
            train_on=self.train_on,
            order=order,
            row_mask=mask,
            reasons=self._reasons,
            payloads=self._payloads,
        )

    @property
    def reasons(self) -> list[str]:
        """Why the first of the rows that are left out as bad cannot be used."""
        return [reason for row, reason in self._reasons if self.row_mask[row]]

    @property
    def report(self) -> DataReport:
        """Counts of what was read, kept, cut and dropped."""
        if self._report is None:
            self._report = report_of(self.table, self.order, self.row_mask)
        return self._report
