"""From the order of the batches to optimiser steps: how many there are, and which batches make each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowrank.data import Batch, BatchPlan


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands in its data: `batch` batches of epoch number `epoch` (from 0) are behind it."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """The batches of one optimiser step.

    Attributes:
        batches: At least one.
        after: The position once they are done.
        epochs: The epochs done by then, with the part of the current one.
    """

    batches: list[Batch]
    after: Position
    epochs: float

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(batch.tokens for batch in self.batches)

    @property
    def supervised(self) -> int:
        """Tokens that carry loss."""
        return sum(batch.supervised for batch in self.batches)

    def to(self, device: torch.device) -> Group:
        """The same on a device."""
        return Group([batch.to(device) for batch in self.batches], self.after, self.epochs)


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run is.

    Attributes:
        steps: Optimiser steps in all.
        per_epoch: Optimiser steps in the first pass over the data.
    """

    steps: int
    per_epoch: int


def run_length(plan: BatchPlan, *, accumulation: int, epochs: float, max_steps: int) -> Length:
    """From `epochs`, each counted by itself (shuffled packs differ in number), or from a positive `max_steps`."""

    def steps_in(epoch: int) -> int:
        return math.ceil(len(plan.epoch(epoch)) / accumulation)

    if max_steps > 0:
        return Length(max_steps, steps_in(0))
    part, whole = math.modf(epochs)
    steps = sum(map(steps_in, range(int(whole)))) + (math.ceil(part * steps_in(int(whole))) if part else 0)
    return Length(steps, steps_in(0))


def groups(plan: BatchPlan, accumulation: int, start: Position = Position()) -> Iterator[Group]:
    """One optimiser step's batches after another, without end. A step does not reach across epochs."""
    epoch, first = start.epoch, start.batch
    while True:
        indices = plan.epoch(epoch)
        for at in range(first, len(indices), accumulation):
            end = min(at + accumulation, len(indices))
            after = Position(epoch, end) if end < len(indices) else Position(epoch + 1)
            yield Group([plan.batch(part) for part in indices[at:end]], after, epoch + end / len(indices))
        epoch, first = epoch + 1, 0
