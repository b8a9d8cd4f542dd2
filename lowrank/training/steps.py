"""From the order of the batches to optimiser steps: how many there are, and which batches make each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from lowrank.data import Batch, BatchPlan, BatchStream, Members, Prefetched
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
        after: The position once they are done.
        epochs: The epochs done by then, with the part of the current one.
        idle: So many of the last batches count for nothing: they keep the process in step with the others.
    """

    batches: list[Batch]
    tokens: int
    supervised: int
    after: Position
    epochs: float
    idle: int = 0

    def to(self, device: torch.device) -> Group:
        """The same on a device."""
        return replace(self, batches=[batch.to(device) for batch in self.batches])


@dataclass(frozen=True, slots=True)
class StepSize:
    """How much goes into an optimiser step, over all processes.

    Attributes:
        batches: So many batches, where `tokens` is None.
        tokens: As many batches as hold no more than so many tokens, each example with all of its own; one at least.
    """

    batches: int = 1
    tokens: int | None = None

    def fits(self, held: list[Batch], more: Batch) -> bool:
        """Whether a step that holds these batches takes one more."""
        if self.tokens is None:
            return len(held) < self.batches
        return sum(batch.tokens for batch in held) + more.tokens <= self.tokens

    def ends(self, plan: BatchPlan, epoch: int) -> list[int]:
        """After which batches of an epoch its steps end. A step does not reach across epochs."""
        indices = plan.epoch(epoch)
        if self.tokens is None:
            return [*range(self.batches, len(indices), self.batches), len(indices)]
        ends, held = [], 0
        for at, part in enumerate(indices):
            size = plan.tokens(part)
            if held and held + size > self.tokens:
                ends.append(at)
                held = 0
            held += size
        return [*ends, len(indices)]

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


def run_length(plan: BatchPlan | BatchStream, size: StepSize, *, epochs: float, max_steps: int) -> Length:
    """From `epochs`, each counted by itself (shuffled packs differ in number), or from a positive `max_steps`."""
    if isinstance(plan, BatchStream):
        assert max_steps > 0, "how long an epoch of a stream is shows only at its end"
        return Length(max_steps, None)

    def steps_in(epoch: int) -> int:
        return len(size.ends(plan, epoch))

    if max_steps > 0:
        return Length(max_steps, steps_in(0))
    part, whole = math.modf(epochs)
    steps = sum(map(steps_in, range(int(whole)))) + (math.ceil(part * steps_in(int(whole))) if part else 0)
    return Length(steps, steps_in(0))


def groups(
    plan: BatchPlan | BatchStream, size: StepSize, start: Position = Position(), ranks: Ranks = ALONE
) -> Iterator[Group]:
    """One optimiser step's batches after another, without end.

    Args:
        plan: The order of the batches.
        size: Of a step.
        start: Where to begin.
        ranks: The processes that a step's batches are shared between.
    """
    if isinstance(plan, BatchStream):
        yield from _streamed(plan, size, start, ranks)
        return
    epoch, first = start.epoch, start.batch
    while True:
        indices = plan.epoch(epoch)
        for end in size.ends(plan, epoch):
            if end <= first:
                continue
            after = Position(epoch, end) if end < len(indices) else Position(epoch + 1)
            yield _group(plan, indices[first:end], after, epoch + end / len(indices), ranks)
            first = end
        epoch, first = epoch + 1, 0


def _streamed(stream: BatchStream, size: StepSize, start: Position, ranks: Ranks) -> Iterator[Group]:
    """The same from a stream, which is read ahead while the model works."""
    epoch, done = start.epoch, start.batch
    while True:
        with Prefetched(stream.batches(epoch, done)) as batches:
            upcoming = next(batches, None)
            if upcoming is None and done == 0:
                raise JobError("there are no rows to train on", where="data.train")
            while upcoming is not None:
                held = [upcoming]
                while (upcoming := next(batches, None)) is not None and size.fits(held, upcoming):
                    held.append(upcoming)
                done += len(held)
                after = Position(epoch, done) if upcoming is not None else Position(epoch + 1)
                yield _shared(held, after, float(epoch), ranks)
        epoch, done = epoch + 1, 0


def _shared(held: list[Batch], after: Position, epochs: float, ranks: Ranks) -> Group:
    mine = [held[at] for at in share([batch.computed for batch in held], ranks)]
    idle = -(-len(held) // ranks.count) - len(mine)
    return Group(
        [*mine, *[held[0]] * idle],
        tokens=sum(batch.tokens for batch in held),
        supervised=sum(batch.supervised for batch in held),
        after=after,
        epochs=epochs,
        idle=idle,
    )


def _group(plan: BatchPlan, parts: list[Members], after: Position, epochs: float, ranks: Ranks) -> Group:
    sizes = [plan.computed(part) for part in parts]
    mine = [parts[at] for at in share(sizes, ranks)]
    idle = -(-len(parts) // ranks.count) - len(mine)  # all must go through the model equally often: layers are gathered
    smallest = parts[min(range(len(parts)), key=sizes.__getitem__)]
    return Group(
        [plan.batch(part) for part in [*mine, *[smallest] * idle]],
        tokens=sum(map(plan.tokens, parts)),
        supervised=sum(map(plan.supervised, parts)),
        after=after,
        epochs=epochs,
        idle=idle,
    )
