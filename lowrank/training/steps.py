"""From the order of the batches to optimiser steps: how many there are, and which batches make each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from lowrank.data import Batch
from lowrank.data.batches.order import Order, Upcoming
from lowrank.errors import JobError
from lowrank.training.machine.ranks import ALONE, Ranks, share


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands in its data: `batch` batches of epoch number `epoch` (from 0) are behind it."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """The batches of one optimiser step.

    Attributes:
        batches: Those that this process computes; at least one.
        tokens: Tokens of the whole step's examples, over all processes, each with all of its own.
        supervised: Those that carry loss.
        counts: What the loss's sums over the step are divided by.
        after: The position once they are done.
        epochs: The epochs done by then, with the part of the current one.
        idle: So many of the last batches count for nothing: they keep the process in step with the others.
    """

    batches: list[Batch]
    tokens: int
    supervised: int
    counts: tuple[int, ...]
    after: Position
    epochs: float
    idle: int = 0

    def to(self, device: torch.device) -> Group:
        """The same on a device."""
        return replace(self, batches=[batch.to(device) for batch in self.batches])


def means_of(sums: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """A batch's part of a step's means, of the same shape as its sums.

    Args:
        sums: As a loss gives them: (), or (k,), of which those beyond `counts` are divided by the first of them.
        counts: Of the step.
    """
    if sums.ndim == 0:
        return sums / counts[0]
    minimised = [sums[at : at + 1] / count for at, count in enumerate(counts)]  # no table of counts goes to the device
    return torch.cat([*minimised, sums[len(counts) :] / counts[0]])


def minimised(means: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The scalar that a step minimises, from its means."""
    return means if means.ndim == 0 else means[: len(counts)].sum()


@dataclass(frozen=True, slots=True)
class StepSize:
    """How much goes into an optimiser step, over all processes.

    Attributes:
        batches: So many batches, where `tokens` is None.
        tokens: As many batches as hold no more than so many tokens, each example with all of its own; one at least.
    """

    batches: int = 1
    tokens: int | None = None

    def fits(self, held: Sequence[Upcoming], more: Upcoming) -> bool:
        """Whether a step that holds these batches takes one more."""
        if self.tokens is None:
            return len(held) < self.batches
        return sum(batch.tokens for batch in held) + more.tokens <= self.tokens

    def ends(self, sizes: Sequence[int]) -> list[int]:
        """After which batches of an epoch its steps end, from their tokens. A step does not reach across epochs."""
        if self.tokens is None:
            return [*range(self.batches, len(sizes), self.batches), len(sizes)]
        ends, held = [], 0
        for at, size in enumerate(sizes):
            if held and held + size > self.tokens:
                ends.append(at)
                held = 0
            held += size
        return [*ends, len(sizes)]

    def steps(self, order: Order, epoch: int) -> int | None:
        """How many an epoch has; None where that shows only at its end."""
        sizes = order.sizes(epoch)
        return None if sizes is None else len(self.ends(sizes))

    def __str__(self) -> str:
        return f"{self.batches} in a step" if self.tokens is None else f"up to {self.tokens:,} tokens in a step"


ONE_BATCH = StepSize()


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run is.

    Attributes:
        steps: Optimiser steps in all.
        per_epoch: Optimiser steps in the first pass over the data; None for a stream.
    """

    steps: int
    per_epoch: int | None


def run_length(order: Order, size: StepSize, *, epochs: float, max_steps: int) -> Length:
    """From `epochs`, each counted by itself (shuffled packs differ in number), or from a positive `max_steps`."""
    if max_steps > 0:
        return Length(max_steps, size.steps(order, 0))
    counts = [size.steps(order, epoch) for epoch in range(math.ceil(epochs))]
    known = [count for count in counts if count is not None]
    assert len(known) == len(counts), "how long an epoch of a stream is shows only at its end"
    part, whole = math.modf(epochs)
    return Length(sum(known[: int(whole)]) + (math.ceil(part * known[-1]) if part else 0), size.steps(order, 0))


def groups(order: Order, size: StepSize, start: Position = Position(), ranks: Ranks = ALONE) -> Iterator[Group]:
    """One optimiser step's batches after another, without end.

    Args:
        order: Of the batches.
        size: Of a step.
        start: Where to begin.
        ranks: The processes that a step's batches are shared between.

    Raises:
        JobError: an epoch has no batch.
    """
    epoch, done = start.epoch, start.batch
    while True:
        sizes = order.sizes(epoch)
        with closing(order.upcoming(epoch, done)) as batches:
            following = next(batches, None)
            if following is None and done == 0:
                raise JobError("there are no rows to train on", where="data.train")
            while following is not None:
                held = [following]
                while (following := next(batches, None)) is not None and size.fits(held, following):
                    held.append(following)
                done += len(held)
                after = Position(epoch, done) if following is not None else Position(epoch + 1)
                yield _group(held, after, float(epoch) if sizes is None else epoch + done / len(sizes), ranks)
        epoch, done = epoch + 1, 0


def _group(held: list[Upcoming], after: Position, epochs: float, ranks: Ranks) -> Group:
    sizes = [batch.computed for batch in held]
    mine = [held[at] for at in share(sizes, ranks)]
    idle = -(-len(held) // ranks.count) - len(mine)  # all must go through the model equally often: layers are gathered
    smallest = held[min(range(len(held)), key=sizes.__getitem__)]
    return Group(
        [batch.built() for batch in [*mine, *[smallest] * idle]],
        tokens=sum(batch.tokens for batch in held),
        supervised=sum(batch.supervised for batch in held),
        counts=tuple(map(sum, zip(*(batch.counts for batch in held), strict=True))),
        after=after,
        epochs=epochs,
        idle=idle,
    )
