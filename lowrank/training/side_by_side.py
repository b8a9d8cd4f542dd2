"""Several runs over one base, side by side: their next packs go through the model as one, each with its own adapter.

A run's step is what it is alone: its batches, its loss divided by its own supervised tokens, its gradients clipped by
their own norm, its optimiser and schedule. Only the base's work is done for all of them at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from lowrank.adapters import routed
from lowrank.attention import segments
from lowrank.data import Batch
from lowrank.data.batches.batch import Holders, Targets
from lowrank.data.batches.order import Order
from lowrank.errors import JobError
from lowrank.training.loop import measured, stop_when_lost, take_step
from lowrank.training.losses.supervised import HiddenLoss
from lowrank.training.machine.memory import HeapKeeper
from lowrank.training.run import Callback, Run
from lowrank.training.steps import Group, StepSize, groups

ROOM = 2048
"""Tokens of a pass at least: packs that are larger gain nothing by going together, and would hold more memory."""


@dataclass
class Member:
    """One of the runs, over packs.

    Attributes:
        run: Its model is that of all.
        order: Of its batches.
        size: Of its steps.
        max_grad_norm: As in `fit`.
        max_skips: As in `fit`.
        parameters: Those of its adapter.
        in_a_row: Steps that were not taken, since the last that was.
        lost: Why it was given up: too many steps in a row that were not finite. The others go on.
    """

    run: Run
    order: Order
    size: StepSize
    max_grad_norm: float
    max_skips: int
    parameters: list[nn.Parameter] = field(init=False)
    in_a_row: int = 0
    lost: JobError | None = None

    def __post_init__(self) -> None:
        groups_of_it = self.run.optimizer.param_groups
        self.parameters = [parameter for group in groups_of_it for parameter in group["params"]]

    @property
    def goes_on(self) -> bool:
        """Whether it has a step to take."""
        return self.run.step < self.run.total_steps and not self.run.stop


def fit_together(
    members: Sequence[Member],
    loss: HiddenLoss,
    *,
    accelerator: Accelerator,
    room: int = ROOM,
    asked_to_end: Callable[[], bool] = lambda: False,
    on_end: Callable[[Member], None] = lambda member: None,
    on_round: Callable[[], None] = lambda: None,
) -> None:
    """Trains each member from where it stands to its end; all that have not ended take each step together.

    Args:
        members: Of one model; between them no parameter trains twice.
        loss: Of the model.
        accelerator: Runs the backward passes.
        room: Packs go into one pass up to so many tokens; one at least.
        asked_to_end: Whether a signal asks all to end after the present step.
        on_end: Told of each member that has taken its last step, or was given up.
        on_round: Told when all have taken a step.
    """
    model, device = members[0].run.model, members[0].parameters[0].device
    upcoming = {id(one): groups(one.order, one.size, one.run.position) for one in members}
    heap = HeapKeeper()
    model.train()
    while there := [one for one in members if one.goes_on]:
        began = time.perf_counter()
        steps = [next(upcoming[id(one)]).to(device) for one in there]
        fetched = time.perf_counter()
        totals = _gradients(model, loss, there, steps, accelerator, room)
        ending = asked_to_end()
        for one, group, total in zip(there, steps, totals, strict=True):
            one.run.stop = one.run.interrupted = ending
            _advance(one, group, total, began, fetched, device)
        heap.mend()
        on_round()
        for one in there:
            if not one.goes_on and not ending:
                on_end(one)
                model.train()


def _advance(
    one: Member, group: Group, total: torch.Tensor, began: float, fetched: float, device: torch.device
) -> None:
    """One member's own step."""
    run = one.run
    step = take_step(run, total, group.counts, one.parameters, one.max_grad_norm)
    run.step, run.position = run.step + 1, group.after
    if not step.taken:
        one.in_a_row += not step.lowered
        run.tell(Callback.on_skip, step.loss, step.grad_norm)
        try:
            stop_when_lost(one.in_a_row, one.max_skips, run)
        except JobError as error:
            run.stop, one.lost = True, error
        return
    one.in_a_row = 0
    run.tell(Callback.on_gradients)
    run.optimizer.zero_grad(set_to_none=True)
    run.tell(Callback.on_step_end, measured(step, run.step, group, began, fetched, device))


class _Piece(NamedTuple):
    """One member's batch of the present step; `at` is the member's place among those that take it."""

    at: int
    batch: Batch


def _gradients(
    model: Any,
    loss: HiddenLoss,
    members: Sequence[Member],
    steps: Sequence[Group],
    accelerator: Accelerator,
    room: int,
) -> list[torch.Tensor]:
    """All members' gradients of a step; returns each one's loss."""
    pieces = [_Piece(at, batch) for at, group in enumerate(steps) for batch in group.batches]
    found: list[list[torch.Tensor]] = [[] for _ in members]
    for held in _passes(pieces, room):
        batch, targets = joined([piece.batch for piece in held])
        names = [members[piece.at].run.adapter for piece in held]
        lengths = [piece.batch.computed for piece in held]
        with segments(model, batch.segments, batch.parents), routed(model, names, lengths):
            parts = [
                part / steps[piece.at].supervised
                for piece, part in zip(held, loss.of_parts(model, batch, targets), strict=True)
            ]
            scaled = [members[piece.at].run.scaler.scale(part) for piece, part in zip(held, parts, strict=True)]
            accelerator.backward(torch.stack(scaled).sum())
        for piece, part in zip(held, parts, strict=True):
            found[piece.at].append(part.detach())
    return [torch.stack(parts).sum() for parts in found]


def _passes(pieces: Sequence[_Piece], room: int) -> Iterator[list[_Piece]]:
    """Those that go through the model together, in their order."""
    held: list[_Piece] = []
    for piece in pieces:
        if held and sum(one.batch.computed for one in held) + piece.batch.computed > room:
            yield held
            held = []
        held.append(piece)
    yield held


def joined(packs: Sequence[Batch]) -> tuple[Batch, list[Targets]]:
    """Packs laid one after another as one, and where each one's targets are in it."""
    tokens, number = 0, 0
    lengths: list[int] = []
    parents: list[int] = []
    targets = []
    for pack in packs:
        assert pack.segments is not None, "what goes together are packs"
        lengths += pack.segments
        parents += [-1 if parent < 0 else parent + number for parent in pack.parents or [-1] * len(pack.segments)]
        targets.append(replace(pack.targets, places=pack.targets.places + tokens))
        tokens, number = tokens + pack.computed, number + len(pack.segments)
    whole = replace(
        packs[0],
        input_ids=torch.cat([pack.input_ids for pack in packs], 1),
        position_ids=torch.cat([pack.position_ids for pack in packs], 1),
        targets=Targets(
            torch.cat([part.places for part in targets]), torch.cat([part.tokens for part in targets]), None
        ),
        holders=Holders(packs[0].holders.examples[:0], packs[0].holders.targets[:0]),
        segments=lengths,
        parents=parents if max(parents) >= 0 else None,
        tokens=sum(pack.tokens for pack in packs),
        supervised=sum(pack.supervised for pack in packs),
    )
    return whole, targets
