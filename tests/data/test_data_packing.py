"""Packing and bucketing: every example once per epoch, none split, bins full, the order a function of seed and epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.data import Example, Examples, packed_batch, padded_batch, plan_batches
from lowrank.data.batches.bin_packing import best_fit_decreasing, pack
from lowrank.errors import InputError


def examples_of(lengths) -> Examples:
    """Examples whose tokens tell which example they belong to; the second half of each is supervised."""
    return Examples.of(
        [Example([number + 10] * n, [at >= n // 2 for at in range(n)]) for number, n in enumerate(lengths)]
    )


def chat_lengths(count=20_000, seed=0, longest=2048):
    drawn = np.random.default_rng(seed).lognormal(5.2, 0.8, count)
    return np.clip(drawn, 16, longest).astype(int)


def plain_best_fit(lengths, budget):
    """The textbook's loop: longest first, into the fullest bin that has room."""
    rooms, bins = [], []
    for item in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        fitting = [at for at, room in enumerate(rooms) if room >= lengths[item]]
        if fitting:
            at = min(fitting, key=lambda at: rooms[at])
            rooms[at] -= lengths[item]
            bins[at].append(item)
        else:
            rooms.append(budget - lengths[item])
            bins.append([item])
    return bins


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_decreasing_is_the_textbooks(lengths):
    bins = best_fit_decreasing(lengths, 50)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    fills = sorted(sum(lengths[item] for item in items) for items in bins)
    assert fills == sorted(sum(lengths[item] for item in items) for items in plain_best_fit(lengths, 50))


@pytest.mark.parametrize("budget", [2048, 4096, 8192])
def test_packs_of_chat_lengths_are_97_percent_full(budget):
    lengths = chat_lengths()
    packs = pack(np.random.default_rng(0).permutation(len(lengths)), lengths, budget)
    assert lengths.sum() / (len(packs) * budget) >= 0.97


class TestPlan:
    lengths = chat_lengths(300, longest=400)

    def plan(self, packing=True, seed=1, shuffle=True):
        return plan_batches(
            examples_of(self.lengths),
            packing=packing,
            batch_size=8,
            max_tokens=512,
            pad_token_id=0,
            seed=seed,
            shuffle=shuffle,
        )

    @pytest.mark.parametrize("packing", [True, False])
    @pytest.mark.parametrize("shuffle", [True, False])
    def test_every_example_comes_once_an_epoch(self, packing, shuffle):
        plan = self.plan(packing, shuffle=shuffle)
        for epoch in range(2):
            assert sorted(np.concatenate([batch.rows for batch in plan.epoch(epoch)])) == list(range(len(self.lengths)))

    def test_packs_keep_the_budget(self):
        assert max(self.lengths[batch.rows].sum() for batch in self.plan().epoch(0)) <= 512

    @pytest.mark.parametrize("packing", [True, False])
    def test_the_order_is_a_function_of_seed_and_epoch(self, packing):
        def orders(plan, epoch):
            return [batch.rows.tolist() for batch in plan.epoch(epoch)]

        plan = self.plan(packing)
        assert orders(plan, 1) == orders(self.plan(packing), 1)
        assert orders(plan, 0) != orders(plan, 1)
        assert orders(plan, 0) != orders(self.plan(packing, seed=2), 0)
        assert orders(plan, 0) == orders(self.plan(packing), 0)

    def test_who_shares_a_pack_changes_with_the_epoch(self):
        lengths = chat_lengths(20_000)
        orders = [np.random.default_rng(epoch).permutation(len(lengths)) for epoch in range(2)]
        packs = [{frozenset(batch.tolist()) for batch in pack(order, lengths, 4096)} for order in orders]
        assert len(packs[0] & packs[1]) < 0.01 * len(packs[0])

    @pytest.mark.parametrize("packing", [True, False])
    def test_an_epoch_is_resumed_anywhere(self, packing):
        whole = list(self.plan(packing).batches(1))
        rest = list(self.plan(packing).batches(1, start=5))
        assert len(rest) == len(whole) - 5
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(whole[5:], rest, strict=True))

    def test_rows_of_a_padded_batch_are_of_like_length(self):
        plan = self.plan(packing=False)
        assert plan.fill() > 0.9
        assert {len(batch) for batch in plan.epoch(0)} <= {8, 300 % 8}

    def test_fill_is_measured(self):
        plan = self.plan()
        assert plan.fill() == pytest.approx(self.lengths.sum() / (len(plan.epoch(0)) * 512))

    def test_an_example_longer_than_a_pack_is_refused(self):
        with pytest.raises(InputError, match="an example of 9 tokens does not fit into a pack of 8"):
            plan_batches(examples_of([9]), packing=True, batch_size=1, max_tokens=8, pad_token_id=0, seed=0)


class TestBatches:
    def test_a_pack(self):
        examples = examples_of([3, 2, 4])
        batch = packed_batch([examples.arrays(at) for at in (0, 2, 1)])
        assert batch.input_ids.tolist() == [[10, 10, 10, 12, 12, 12, 12, 11, 11]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1]]
        assert batch.targets.places.tolist() == [0, 1, 4, 5, 7]
        assert batch.targets.tokens.tolist() == [10, 10, 12, 12, 11]
        assert batch.targets.weights is None
        assert batch.holders.examples.tolist() == [0, 0, 1, 1, 2]
        assert batch.holders.targets.tolist() == [0, 1, 2, 3, 4]
        assert batch.attention_mask is None
        assert (batch.segments, batch.parents) == ([3, 4, 2], None)
        assert (batch.tokens, batch.computed, batch.supervised) == (9, 9, 5)
        tensors = (batch.input_ids, batch.position_ids, batch.targets.places, batch.targets.tokens)
        assert {tensor.dtype for tensor in tensors} == {torch.int64}

    def test_a_pack_whose_examples_begin_alike(self):
        """Where a beginning ends there is a next token for each example; one that carries loss counts for all."""
        rows = [[5, 6, 7, 8, 9], [5, 6, 7, 4], [5, 6, 3]]
        masks = [[False, True, False, True, True], [False, True, False, True], [False, False, True]]
        parts = [(np.array(row), np.array(mask)) for row, mask in zip(rows, masks, strict=True)]
        batch = packed_batch(parts, shared=[0, 3, 2])
        assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 2]]
        assert batch.segments == [2, 1, 2, 1, 1]
        assert batch.parents == [-1, 0, 1, 1, 0]
        assert batch.targets.places.tolist() == [0, 2, 3, 2, 1]
        assert batch.targets.tokens.tolist() == [6, 8, 9, 4, 3]
        assert batch.targets.weights.tolist() == [2, 1, 1, 1, 1]
        assert batch.holders.examples.tolist() == [0, 0, 0, 1, 1, 2]
        assert batch.holders.targets.tolist() == [0, 1, 2, 0, 3, 4]
        assert (batch.tokens, batch.computed, batch.supervised) == (12, 7, 6)

    def test_the_first_token_of_a_segment_is_never_a_target(self):
        examples = Examples.of([Example([5, 6], [True, True]), Example([7], [True])])
        batch = packed_batch([examples.arrays(at) for at in range(2)])
        assert batch.targets.places.tolist() == [0]
        assert batch.targets.tokens.tolist() == [6]

    def test_padded_rows(self):
        examples = examples_of([3, 2])
        batch = padded_batch([examples.arrays(at) for at in (0, 1)], pad_token_id=11)
        assert batch.input_ids.tolist() == [[10, 10, 10], [11, 11, 11]]
        assert batch.targets.places.tolist() == [0, 1, 3]
        assert batch.targets.tokens.tolist() == [10, 10, 11]
        assert batch.holders.examples.tolist() == [0, 0, 1]
        assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
        assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
        assert batch.segments is None
        assert (batch.tokens, batch.computed, batch.supervised) == (5, 6, 3)

    def test_to_a_device(self):
        batch = packed_batch([examples_of([3]).arrays(0)]).to("meta")
        assert batch.targets.places.device.type == "meta"
        assert (batch.tokens, batch.segments) == (3, [3])
