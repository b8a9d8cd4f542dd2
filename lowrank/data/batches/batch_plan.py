"""The order of the batches of every epoch: a function of (seed, epoch) alone, so a run resumes anywhere in it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from lowrank.data.batches.batch import Batch, packed_batch, padded_batch
from lowrank.data.batches.beginnings import Beginnings, beginnings
from lowrank.data.batches.bin_packing import WINDOW, pack
from lowrank.data.batches.grouping import Members, Room, pack_forests, room_for
from lowrank.data.batches.trees import Trees
from lowrank.data.examples.example import Examples, IdsAndMask
from lowrank.data.examples.figures import DataReport
from lowrank.errors import InputError

# Batches of padded rows are cut from so many batches' worth of rows sorted by length.
BUCKET_BATCHES = 64
Collate = Callable[[Sequence[IdsAndMask], Sequence[Any], int], Batch]
"""Of a task: tokens and marks of some examples, what belongs to each beside them, and what pads, to a batch."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """What examples begin with in common is computed once in a pack.

    Attributes:
        alike: What they begin with in common.
        room: Of a pack.
    """

    alike: Beginnings
    room: Room


@dataclass
class BatchPlan:
    """Which examples go into which batch, epoch by epoch; made by `plan_batches`.

    Attributes:
        unshared: Why what examples begin with in common is computed for each of them, where that is to be told.
        collate: Of a task, makes padded batches; None for those of the next token.
        trees: Of rows of several answers, how they lie in a batch; None for others.
    """

    examples: Examples
    packing: bool
    batch_size: int
    max_tokens: int | None
    pad_token_id: int
    seed: int
    shuffle: bool
    sharing: Sharing | None = None
    unshared: str | None = None
    collate: Collate | None = None
    trees: Trees | None = None
    _epochs: dict[int, list[Members]] = field(default_factory=dict, repr=False)

    def epoch(self, epoch: int) -> list[Members]:
        """The batches of an epoch, each as indices into the examples."""
        if epoch not in self._epochs:
            self._epochs = {epoch: self._planned(epoch)}
        return self._epochs[epoch]

    def batch(self, members: Members) -> Batch:
        """The tensors of one batch."""
        if self.trees is not None:
            return self.trees.batch(members.rows.tolist(), packing=self.packing, pad_token_id=self.pad_token_id)
        parts = [self.examples.arrays(int(index)) for index in members.rows]
        if self.collate is not None:
            return self.collate(parts, [self.examples.payload(int(index)) for index in members.rows], self.pad_token_id)
        if not self.packing:
            return padded_batch(parts, self.pad_token_id)
        return packed_batch(parts, None if members.shared is None else members.shared.tolist())

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on."""
        for members in self.epoch(epoch)[start:]:
            yield self.batch(members)

    def tokens(self, members: Members) -> int:
        """Tokens of one batch's examples, each with all of its own."""
        return int(self.examples.lengths[members.rows].sum())

    def computed(self, members: Members) -> int:
        """Tokens of one batch that go through the model: padding too, and what examples share once."""
        if self.trees is not None and self.packing:
            return int(self.trees.lengths[members.rows].sum())
        if (self.collate is not None and self._of_several_texts) or self.trees is not None:
            return self.batch(members).computed
        if not self.packing:
            return len(members) * int(self.examples.lengths[members.rows].max())
        return self.tokens(members) - (0 if members.shared is None else int(members.shared.sum()))

    @property
    def _of_several_texts(self) -> bool:
        """Whether an example is more than one text, each of which becomes a row."""
        table = self.examples.table
        return bool((table.row_lengths[table.example_rows] != np.diff(table.starts)).any())

    def supervised(self, members: Members) -> int:
        """Tokens of one batch's examples that carry loss."""
        return sum(int(self.examples.arrays(int(index))[1].sum()) for index in members.rows)

    def counts_of(self, members: Members) -> tuple[int, ...]:
        """What the sums of a loss over one batch are divided by."""
        return (self.supervised(members),) if self.trees is None else self.trees.counts(members.rows.tolist())

    def sizes(self, epoch: int) -> list[int]:
        """Tokens of the examples of each of an epoch's batches."""
        batches = self.epoch(epoch)
        begins = np.cumsum([0, *map(len, batches[:-1])])
        rows = [members.rows for members in batches]
        return np.add.reduceat(self.examples.lengths[np.concatenate(rows)], begins).tolist() if batches else []

    def upcoming(self, epoch: int, start: int = 0) -> Generator[_Planned, None, None]:
        """The batches of an epoch from number `start` on, each built when it is asked to be."""
        for members in self.epoch(epoch)[start:]:
            yield _Planned(self, members)

    def largest(self) -> Batch:
        """The batch of the first epoch with the most tokens that go through the model."""
        return self.batch(max(self.epoch(0), key=self.computed))

    def demanding(self, count: int) -> list[Batch]:
        """Of the first epoch: the batch of the most tokens, of the longest example, of the most loss, then others."""
        batches = self.epoch(0)

        def longest(members: Members) -> int:
            return int(self.examples.lengths[members.rows].max())

        measures = (self.computed, longest, self.supervised)
        first = [max(range(len(batches)), key=lambda at: measure(batches[at])) for measure in measures]
        order = list(dict.fromkeys([*first, *range(len(batches))]))
        return [self.batch(batches[at]) for at in order[:count]]

    def sample(self, rows: int) -> Examples:
        """All examples: they are here."""
        return self.examples

    def for_model(self, vocabulary: int, positions: int | None) -> Self:
        """Itself: no row is still to be read."""
        return self

    @property
    def origin(self) -> str:
        """What has been read, in numbers."""
        return str(self.counts)

    @property
    def counts(self) -> DataReport:
        """What has been read and what became of it."""
        return self.examples.report

    @property
    def reasons(self) -> list[str]:
        """Why the first rows that were left out as bad cannot be used."""
        return self.examples.reasons

    @property
    def fingerprint(self) -> str:
        """Equal for the same examples in the same order, in packs of the same room where they share beginnings."""
        return self.examples.fingerprint + ("" if self.sharing is None else f" {self.sharing.room}")

    def passing(self, epoch: int = 0) -> int:
        """Tokens of an epoch that go through the model."""
        return sum(map(self.computed, self.epoch(epoch)))

    def fill(self, epoch: int = 0) -> float:
        """The share of an epoch's batches that is tokens and not padding (in a pack: not left empty)."""
        if self.packing:
            assert self.max_tokens is not None
            return self.passing(epoch) / (len(self.epoch(epoch)) * self.max_tokens)
        return float(self.examples.lengths.sum() / self.passing(epoch))

    @property
    def shares(self) -> bool:
        """Whether what examples begin with in common is computed once."""
        return self.sharing is not None or (self.packing and self.trees is not None and self.trees.shared)

    def without_sharing(self, why: str | None = None) -> Self:
        """The same examples, each of them (of several answers each) computed from its beginning."""
        if self.trees is None or self.max_tokens is None:
            return replace(self, sharing=None, unshared=why, _epochs={})
        trees = self.trees.without_sharing()
        room = max(self.max_tokens, int(trees.lengths.max()))
        return replace(self, trees=trees, max_tokens=room, unshared=why, _epochs={})

    def _planned(self, epoch: int) -> list[Members]:
        rng = np.random.default_rng([self.seed, epoch])
        lengths = self.examples.lengths if self.trees is None else self.trees.lengths
        order = rng.permutation(len(lengths)) if self.shuffle else np.arange(len(lengths))
        if self.sharing is not None:
            batches = pack_forests(order, lengths, self.sharing.alike, self.sharing.room)
        elif self.packing:
            assert self.max_tokens is not None
            batches = [Members(rows) for rows in pack(order, lengths, self.max_tokens)]
        else:
            batches = [Members(rows) for rows in _bucketed(order, lengths, self.batch_size)]
        return [batches[at] for at in rng.permutation(len(batches))] if self.shuffle else batches


@dataclass(frozen=True, slots=True)
class _Planned:
    """A batch of a plan, before it is built."""

    plan: BatchPlan
    members: Members

    @property
    def tokens(self) -> int:
        return self.plan.tokens(self.members)

    @property
    def computed(self) -> int:
        return self.plan.computed(self.members)

    @property
    def supervised(self) -> int:
        return self.plan.supervised(self.members)

    @property
    def counts(self) -> tuple[int, ...]:
        return self.plan.counts_of(self.members)

    def built(self) -> Batch:
        return self.plan.batch(self.members)


def _bucketed(order: np.ndarray, lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    batches = []
    window = batch_size * BUCKET_BATCHES
    for begin in range(0, len(order), window):
        part = order[begin : begin + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
    return batches


def plan_batches(
    examples: Examples,
    *,
    packing: bool,
    batch_size: int,
    max_tokens: int | None,
    pad_token_id: int,
    seed: int,
    shuffle: bool = True,
    share_prefixes: bool = False,
    step_tokens: int | None = None,
    ranks: int = 1,
) -> BatchPlan:
    """Plan the batches of a data set.

    Args:
        examples: The data set.
        packing: Packs of several examples without padding, one pack a batch; otherwise padded rows, bucketed by length.
        batch_size: Rows in a padded batch. A pack holds as many examples as fit.
        max_tokens: Tokens of a pack that go through the model. Padded rows are as long as they are.
        pad_token_id: What padded rows are filled with.
        seed: With the epoch's number it decides the order.
        shuffle: A new order each epoch; otherwise the examples stay in their order as far as packs and buckets allow.
        share_prefixes: In packs, what examples begin with in common is computed once; those that begin alike come
            together (`grouping`).
        step_tokens: With that, the tokens of an optimiser step's examples, each with all of its own: a pack holds so
            many at most, and where several packs make a step as many as divide it evenly, so that steps hold as much as
            they do without. None: a pack holds as many as fit.
        ranks: With that, the processes that a step's packs are shared between.

    Raises:
        InputError: an example is longer than a pack.
    """
    if packing:
        assert max_tokens is not None, "packs need max_tokens"
        longest = int(examples.lengths.max()) if len(examples) else 0
        if longest > max_tokens:
            raise InputError(
                f"an example of {longest} tokens does not fit into a pack of {max_tokens}",
                where="training.tokens_per_batch",
                fix="Raise it to data.max_length at least.",
            )
    plan = BatchPlan(examples, packing, batch_size, max_tokens, pad_token_id, seed, shuffle)
    if not (share_prefixes and packing and len(examples)):
        return plan
    assert max_tokens is not None
    lengths = examples.lengths
    alike = beginnings(examples.table.ids, examples.table.starts[examples.order], lengths)
    first = np.random.default_rng([seed, 0]).permutation(len(lengths))[:WINDOW]
    plan.sharing = Sharing(alike, room_for(first, lengths, alike, max_tokens, step_tokens, ranks))
    return plan
