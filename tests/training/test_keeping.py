"""Which checkpoints a run writes and keeps: the rules, played through without a model."""

from __future__ import annotations

from itertools import product

import pytest

from lowrank.training.checkpoints.keeping import Keeping


def played(keeping, total, evaluations=None, best=()):
    """Those that are there after a run whose steps take a minute each, and how many there ever were at once."""
    there, most, written, best_so_far = [], 0, 0, None
    for step in range(1, total + 1):
        if evaluations and step % evaluations == 0 and step in best:
            best_so_far = step
        if keeping.due(step, step - written, last=step == total, best=best_so_far):
            there.append(step)
            written, most = step, max(most, len(there))
            there = [one for one in there if one not in keeping.dropped(there, best_so_far)]
    return there, most


@pytest.mark.parametrize(
    ("keeping", "left"),
    [
        (Keeping(2, steps=3), [9, 10]),
        (Keeping(1, steps=4), [10]),
        (Keeping(3, minutes=4), [4, 8, 10]),
        (Keeping(2), []),
        (Keeping(9, steps=5, minutes=4), [4, 5, 9, 10]),
    ],
    ids=str,
)
def test_the_newest_stay(keeping, left):
    assert played(keeping, 10)[0] == left


def test_the_best_is_written_when_it_is_found_and_stays():
    assert played(Keeping(1, steps=4), 10, evaluations=3, best=[3])[0] == [3, 10]
    assert played(Keeping(1, steps=4), 10, evaluations=3, best=[3, 6])[0] == [6, 10]
    assert played(Keeping(1), 10, evaluations=3, best=[3, 9])[0] == [9]


def test_there_are_never_more_than_was_said():
    reached = set()
    for newest, steps, minutes, total in product((1, 2, 3), (None, 1, 2, 5), (None, 1, 3), (1, 4, 12)):
        keeping = Keeping(newest, steps, minutes)
        for evaluations, best in ((None, ()), (1, (1,)), (2, (2,)), (2, (2, 4, 6)), (3, range(13))):
            _, most = played(keeping, total, evaluations, best)
            assert most <= keeping.most(total, evaluations)
            reached.add(most == keeping.most(total, evaluations))
    assert reached == {True, False}
