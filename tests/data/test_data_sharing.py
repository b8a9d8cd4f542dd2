"""Plans and streams whose packs hold what examples begin with in common once."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import tiny_tokenizer

from lowrank.data import Batch, Example, Examples, plan_batches, stream_batches
from lowrank.training.machine.ranks import ALONE
from lowrank.training.steps import Position, StepSize, groups, run_length

SYSTEM, TURN, ROWS = 200, 25, 120


def conversations(systems: int = 2) -> Examples:
    """Rows of one of two system prompts and a turn of their own, whose second half carries loss."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(10, 200, (systems, SYSTEM))
    rows = [[*prompts[at % systems], *rng.integers(10, 200, TURN)] for at in range(ROWS)]
    return Examples.of([Example(row, [at >= SYSTEM + TURN // 2 for at in range(len(row))]) for row in rows])


def plan(examples: Examples, *, seed=1, max_tokens=450, share=True, step_tokens=None, ranks=1):
    return plan_batches(
        examples, packing=True, batch_size=1, max_tokens=max_tokens, pad_token_id=0, seed=seed, share_prefixes=share,
        step_tokens=step_tokens, ranks=ranks,
    )  # fmt: skip


def rows_in(batch: Batch) -> list[list[int]]:
    """The examples of a pack, from its segments with their ancestors'."""
    assert batch.segments is not None
    parts = [part.tolist() for part in batch.input_ids[0].split(batch.segments)]
    parents = batch.parents or [-1] * len(parts)
    whole: list[list[int]] = []
    for part, parent in zip(parts, parents, strict=True):
        whole.append([*(whole[parent] if parent >= 0 else []), *part])
    return [row for number, row in enumerate(whole) if number not in parents]


def test_every_example_comes_once_an_epoch_in_fewer_tokens():
    examples = conversations()
    found = plan(examples)
    for epoch in range(2):
        batches = list(found.batches(epoch))
        assert sorted(row for batch in batches for row in rows_in(batch)) == sorted(e.input_ids for e in examples)
        assert max(batch.computed for batch in batches) <= 450
        assert sum(batch.tokens for batch in batches) == examples.lengths.sum()
        assert sum(batch.supervised for batch in batches) == examples.report.supervised_tokens
    assert found.passing() == len(found.epoch(0)) * 450 == 12 * 450
    assert found.fill() == 1.0


def test_what_a_plan_says_of_a_batch_is_what_it_holds():
    found = plan(conversations())
    for members in found.epoch(0):
        batch = found.batch(members)
        assert found.tokens(members) == batch.tokens
        assert found.computed(members) == batch.computed
        assert found.supervised(members) == batch.supervised
    assert found.largest().computed == max(map(found.computed, found.epoch(0)))


def test_an_epoch_is_resumed_anywhere_and_is_a_function_of_the_seed():
    whole, rest = list(plan(conversations()).batches(1)), list(plan(conversations()).batches(1, start=5))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(whole[5:], rest, strict=True))
    other = list(plan(conversations(), seed=2).batches(1))
    assert any(not torch.equal(a.input_ids, b.input_ids) for a, b in zip(whole, other, strict=False))


def test_who_shares_a_pack_changes_with_the_epoch():
    found = plan(conversations())
    first, second = ({frozenset(members.rows.tolist()) for members in found.epoch(epoch)} for epoch in range(2))
    assert len(first & second) < 2


def test_without_sharing_it_is_the_plan_that_was_not_asked_to():
    examples = conversations()
    bare, asked = plan(examples, share=False), plan(examples)
    bare_again = asked.without_sharing()
    assert asked.sharing is not None
    assert bare_again.sharing is None
    assert [m.rows.tolist() for m in bare.epoch(0)] == [m.rows.tolist() for m in bare_again.epoch(0)]


def test_examples_that_share_nothing_are_packed_as_ever():
    rng = np.random.default_rng(0)
    rows = [[number, *rng.integers(0, 99, rng.integers(20, 200))] for number in range(100)]
    examples = Examples.of([Example(row, [True] * len(row)) for row in rows])
    alone, shared = plan(examples, share=False), plan(examples, step_tokens=450)
    assert [sorted(m.rows) for m in alone.epoch(0)] == [sorted(m.rows) for m in shared.epoch(0)]
    assert shared.passing() == examples.lengths.sum()


@pytest.mark.parametrize("step_tokens", [450, 900, 2250, 4500])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_holds_as_much_as_without_sharing(step_tokens, ranks):
    """Real tokens: what changes is how many of them go through the model."""
    examples = conversations()
    size = StepSize(tokens=step_tokens)
    found = plan(examples, step_tokens=step_tokens, ranks=ranks)
    plain = plan(examples, share=False)
    steps, steps_plain = (run_length(each, size, epochs=1, max_steps=-1).steps for each in (found, plain))
    assert abs(steps - steps_plain) <= max(1, 0.1 * steps_plain)
    taken = groups(found, size, Position(), ALONE)
    assert max(next(taken).tokens for _ in range(steps)) <= step_tokens
    if step_tokens >= 2250:
        assert found.passing() < 0.7 * examples.lengths.sum()


def test_packs_divide_a_step_evenly():
    """A step of 4,500 tokens is 20 rows: not one pack of 10 rows and a rest that no other fits."""
    found = plan(conversations(systems=1), step_tokens=4500)
    assert {found.tokens(members) for members in found.epoch(0)} == {2250}


class TestStreams:
    tokenizer = tiny_tokenizer()

    @pytest.fixture
    def path(self, tmp_path):
        system = {"role": "system", "content": " ".join(f"rule {n}" for n in range(30))}
        rows = [
            {"messages": [system, {"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}" * 9}]}
            for n in range(150)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "rows.jsonl"

    def stream(self, path, step_tokens=1 << 20):
        stream = stream_batches(
            path, self.tokenizer, max_length=512, packing=True, batch_size=1, max_tokens=1024, pad_token_id=0, seed=3,
            buffer=64,
        )  # fmt: skip
        return stream, stream.as_sampled(plan(stream.sample(100), max_tokens=1024, step_tokens=step_tokens))

    def test_every_example_comes_once_in_fewer_tokens(self, path):
        plain, shared = self.stream(path)
        for epoch in range(2):
            expected, found = list(plain.batches(epoch)), list(shared.batches(epoch))
            assert sorted(row for b in found for row in rows_in(b)) == sorted(
                row for b in expected for row in rows_in(b)
            )
            assert max(batch.computed for batch in found) <= 1024
            computed = [sum(batch.computed for batch in batches) for batches in (expected, found)]
            assert computed[1] < 0.5 * computed[0]

    def test_an_epoch_is_resumed_anywhere(self, path):
        _, shared = self.stream(path)
        whole, rest = list(shared.batches(1)), list(shared.batches(1, start=2))
        assert len(rest) == len(whole) - 2
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(whole[2:], rest, strict=True))

    def test_packs_hold_no_more_than_a_step(self, path):
        _, shared = self.stream(path, step_tokens=2048)
        assert max(batch.tokens for batch in shared.batches(0)) <= 2048
