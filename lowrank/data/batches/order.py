"""What a run asks of its batches, whether the rows are in memory (a plan) or read as it goes (a stream)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol, Self

from lowrank.data.batches.batch import Batch
from lowrank.data.examples.example import Examples
from lowrank.data.examples.figures import DataReport, StreamCounts


class Upcoming(Protocol):
    """A batch that may have to be built yet."""

    @property
    def tokens(self) -> int:
        """Tokens of its examples, each with all of its own."""
        ...

    @property
    def computed(self) -> int:
        """Tokens that go through the model: padding too, and what examples share once."""
        ...

    @property
    def supervised(self) -> int:
        """Those of them that carry loss."""
        ...

    @property
    def counts(self) -> tuple[int, ...]:
        """What the loss's sums are divided by."""
        ...

    def built(self) -> Batch:
        """Its tensors."""
        ...


class Order(Protocol):
    """The batches of every epoch: the same each time they are asked for, so that a run resumes anywhere."""

    def sizes(self, epoch: int) -> Sequence[int] | None:
        """Tokens of each of an epoch's batches; None where how many there are shows only at its end."""
        ...

    def upcoming(self, epoch: int, start: int = 0) -> Generator[Upcoming, None, None]:
        """The batches of an epoch from number `start` on; closed before the end, it stops what works ahead."""
        ...


class Batches(Order, Protocol):
    """All that a run trains on."""

    @property
    def packing(self) -> bool:
        """Whether a batch is a pack without padding."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows in a padded batch."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Tokens in a pack."""
        ...

    @property
    def examples(self) -> Examples | None:
        """All of them; None where they are never all here."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for the same examples in the same order."""
        ...

    @property
    def origin(self) -> str:
        """What will be read: in numbers, or where it will come from."""
        ...

    @property
    def counts(self) -> DataReport | StreamCounts:
        """What has been read and what became of it; as a text, in numbers."""
        ...

    @property
    def reasons(self) -> list[str]:
        """Why the first rows that were left out as bad cannot be used."""
        ...

    def sample(self, rows: int) -> Examples:
        """The examples at hand: all, or those of the first `rows` rows."""
        ...

    def for_model(self, vocabulary: int, positions: int | None) -> Self:
        """The same, with rows that are not here yet proved to fit a model as they are read (as `check_fits` does)."""
        ...

    def largest(self) -> Batch:
        """The largest batch of the first epoch, or that can come."""
        ...

    def demanding(self, count: int) -> list[Batch]:
        """At most `count` batches, those that take the most memory first."""
        ...

    @property
    def shares(self) -> bool:
        """Whether what examples begin with in common is computed once."""
        ...

    @property
    def unshared(self) -> str | None:
        """Why it is computed for each of them, where that is to be told."""
        ...

    def without_sharing(self, why: str | None = None) -> Self:
        """The same examples, each of them computed from its beginning."""
        ...

    def passing(self) -> int | None:
        """Tokens of the first epoch that go through the model; None where that is unknown."""
        ...

    def fill(self) -> float | None:
        """The share of a batch that is tokens and not padding (in a pack: not left empty); None where it is unknown."""
        ...
