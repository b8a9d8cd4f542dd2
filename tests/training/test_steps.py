"""Batches to optimiser steps: the same whether it is known how many an epoch has, resumed anywhere, shared by all."""

from itertools import islice

import numpy as np
import pytest

from lowrank.data import Example, Examples, plan_batches
from lowrank.errors import JobError
from lowrank.training.machine.ranks import Ranks
from lowrank.training.steps import Position, StepSize, groups, run_length

SIZES = [StepSize(1), StepSize(3), StepSize(tokens=70), StepSize(tokens=1)]


def plan_of(packing):
    rng = np.random.default_rng(0)
    rows = [Example(list(range(1, n + 1)), [False] + [True] * (n - 1)) for n in rng.integers(3, 20, size=40).tolist()]
    sizes = {"batch_size": 3, "max_tokens": 32 if packing else None}
    return plan_batches(Examples.of(rows, "all"), packing=packing, pad_token_id=0, seed=1, **sizes)


class Streamed:
    """The same batches, where how many there are shows only at the end."""

    def __init__(self, plan):
        self.plan = plan

    def sizes(self, epoch):
        return None

    def upcoming(self, epoch, start=0):
        yield from self.plan.batches(epoch, start)


class Nothing:
    """No batches at all."""

    def sizes(self, epoch):
        return None

    def upcoming(self, epoch, start=0):
        yield from ()


def told(group):
    ids = [batch.input_ids.tolist() for batch in group.batches]
    return ids, group.tokens, group.supervised, group.after, group.idle


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_stream_of_the_same_batches_gives_the_same_steps(packing, size):
    plan = plan_of(packing)
    steps = run_length(plan, size, epochs=2, max_steps=-1).steps
    ours, streamed = (list(islice(groups(order, size), steps)) for order in (plan, Streamed(plan)))
    assert list(map(told, ours)) == list(map(told, streamed))
    assert ours[-1].after == Position(2)
    assert ours[-1].epochs == 2.0
    if size.tokens is not None:
        assert all(group.tokens <= size.tokens or len(group.batches) == 1 for group in ours)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_begins_where_another_step_ended(size):
    plan = plan_of(True)
    whole = list(islice(groups(plan, size), 12))
    for order in (plan, Streamed(plan)):
        rest = islice(groups(order, size, whole[4].after), 7)
        assert [told(group) for group in rest] == [told(group) for group in whole[5:]]


def test_each_process_has_its_part_and_goes_through_the_model_as_often():
    plan = plan_of(True)
    alone = next(groups(plan, StepSize(3)))
    for order in (plan, Streamed(plan)):
        parts = [next(groups(order, StepSize(3), ranks=Ranks(index, count=2))) for index in range(2)]
        assert [len(part.batches) for part in parts] == [2, 2]
        assert [part.idle for part in parts] == [0, 1] or [part.idle for part in parts] == [1, 0]
        assert all((part.tokens, part.supervised) == (alone.tokens, alone.supervised) for part in parts)
        seen = [b.input_ids.tolist() for part in parts for b in part.batches[: len(part.batches) - part.idle]]
        assert sorted(seen) == sorted(batch.input_ids.tolist() for batch in alone.batches)
        idle = next(part for part in parts if part.idle)
        assert idle.batches[-1].tokens == min(batch.tokens for batch in alone.batches)


def test_how_long_a_run_is():
    plan, size = plan_of(True), StepSize(2)
    first, second = (-(-len(plan.epoch(epoch)) // 2) for epoch in range(2))
    assert run_length(plan, size, epochs=1.5, max_steps=-1).steps == first + -(-second // 2)
    assert run_length(plan, size, epochs=9, max_steps=7).steps == 7
    assert run_length(plan, size, epochs=9, max_steps=7).per_epoch == first
    assert run_length(Streamed(plan), size, epochs=1, max_steps=7).per_epoch is None


def test_a_plan_knows_the_tokens_of_its_batches_before_they_are_built():
    for packing in (True, False):
        plan = plan_of(packing)
        assert plan.sizes(1) == [batch.tokens for batch in plan.batches(1)]
        assert [(b.tokens, b.supervised) for b in plan.upcoming(1, 2)] == [
            (batch.tokens, batch.supervised) for batch in plan.batches(1, 2)
        ]


def test_no_rows_are_no_endless_loop():
    with pytest.raises(JobError, match="there are no rows to train on"):
        next(groups(Nothing(), StepSize(1)))
