"""Rows with common beginnings: found by comparing tokens, grouped into packs, and laid down once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.attention.forest import positions_of
from lowrank.data.batches.beginnings import LEAST, beginnings_of, worthwhile
from lowrank.data.batches.bin_packing import pack
from lowrank.data.batches.grouping import Room, pack_forests
from lowrank.data.batches.pack_forest import forest_of

PARTS = np.random.default_rng(0).integers(0, 9, (4, 50)).astype(np.int32)


@st.composite
def families(draw):
    """Rows made of a few parts, so that they begin alike for all sorts of lengths; some are there twice."""
    made = draw(
        st.lists(
            st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), min_size=1, max_size=3), min_size=1, max_size=25
        )
    )
    return [np.concatenate([PARTS[which][:length] for which, length in row]) for row in made]


def in_common(one, other) -> int:
    same = min(len(one), len(other))
    differ = np.flatnonzero(one[:same] != other[:same])
    return int(differ[0]) if len(differ) else same


def tree_of(rows) -> int:
    """Tokens of rows whose beginnings are there once: the nodes of the trie."""
    return len({tuple(row[: end + 1].tolist()) for row in rows for end in range(len(row))})


@settings(max_examples=200, deadline=None)
@given(families())
def test_neighbours_begin_with_what_is_said(rows):
    alike = beginnings_of(rows)
    assert sorted(alike.order) == list(range(len(rows)))
    assert (alike.order[alike.places] == np.arange(len(rows))).all()
    for at in range(1, len(rows)):
        one, other = (rows[alike.order[place]] for place in (at - 1, at))
        assert alike.shared[at] == 0 or LEAST <= alike.shared[at] <= in_common(one, other)


@settings(max_examples=200, deadline=None)
@given(families())
def test_hardly_any_of_what_could_be_shared_is_lost(rows):
    """Less than a stretch for each place at which rows part."""
    alike, lengths = beginnings_of(rows), [len(row) for row in rows]
    lost = sum(lengths) - alike.shared.sum() - tree_of(rows)
    assert 0 <= lost < 2 * LEAST * len(rows)


def test_of_a_system_prompt_with_turns_nothing_is_lost():
    rng = np.random.default_rng(1)
    system = rng.integers(0, 1000, 700)
    rows = [np.concatenate([system, [number], rng.integers(0, 1000, 20)]).astype(np.int32) for number in range(40)]
    alike = beginnings_of(rows)
    assert alike.shared[1:].tolist() == [700] * 39


def test_a_place_that_is_too_near_gives_way_to_the_one_before_it():
    assert worthwhile(np.array([0, 40, 50, 56, 40, 15])).tolist() == [0, 40, 40, 56, 40, 0]


@settings(max_examples=100, deadline=None)
@given(families(), st.sampled_from([Room(200), Room(200, 200), Room(200, 350)]))
def test_every_row_is_packed_once_and_packs_have_room(rows, room):
    alike, lengths = beginnings_of(rows), np.array([len(row) for row in rows])
    packs = pack_forests(np.random.default_rng(2).permutation(len(rows)), lengths, alike, room, window=10)
    assert sorted(np.concatenate([members.rows for members in packs])) == list(range(len(rows)))
    for members in packs:
        found, shared = alike.among(members.rows)
        assert found.tolist() == members.rows.tolist()
        assert shared.tolist() == members.shared.tolist()
        real = lengths[members.rows].sum()
        assert room.holds(real - shared.sum(), real)


def test_rows_that_share_nothing_are_packed_as_ever():
    rng = np.random.default_rng(3)
    lengths = rng.integers(20, 400, 300)
    rows = [np.concatenate([[number], rng.integers(0, 9, n - 1)]).astype(np.int32) for number, n in enumerate(lengths)]
    order = rng.permutation(len(rows))
    found = pack_forests(order, lengths, beginnings_of(rows), Room(512, 512), window=128)
    assert [sorted(one.rows) for one in found] == [sorted(one) for one in pack(order, lengths, 512, window=128)]


def documents(count: int, questions: int) -> list[np.ndarray]:
    """Rows of 230 tokens, of which 200 are those of one of `count` documents."""
    rng = np.random.default_rng(4)
    texts = rng.integers(0, 1000, (count, 200))
    asked = [(text, rng.integers(0, 1000, 30)) for text in texts for _ in range(questions)]
    return [np.concatenate(pair).astype(np.int32) for pair in asked]


def test_the_questions_about_a_document_come_together():
    rows = documents(20, 8)
    alike, lengths = beginnings_of(rows), np.array([len(row) for row in rows])
    packs = pack_forests(np.random.default_rng(5).permutation(len(rows)), lengths, alike, Room(450))
    assert max(len(set(members.rows // 8)) for members in packs) == 1
    assert len(packs) == 20


def test_who_shares_a_pack_changes_with_the_shuffle():
    rows = documents(1, 200)
    alike, lengths = beginnings_of(rows), np.array([len(row) for row in rows])
    first, second = (
        {frozenset(one.rows.tolist()) for one in pack_forests(rng.permutation(200), lengths, alike, Room(500))}
        for rng in map(np.random.default_rng, (0, 1))
    )
    assert not first & second


def test_rows_that_have_little_in_common_keep_the_shuffled_order():
    """A greeting of 20 tokens in rows of 400 is no reason to bring rows together."""
    rng = np.random.default_rng(6)
    greetings = rng.integers(0, 1000, (4, 20))
    rows = [np.concatenate([greetings[at % 4], rng.integers(0, 1000, 380)]).astype(np.int32) for at in range(200)]
    alike, lengths, order = beginnings_of(rows), np.full(200, 400), rng.permutation(200)
    found = pack_forests(order, lengths, alike, Room(2000, 2000))
    assert [sorted(one.rows) for one in found] == [sorted(one) for one in pack(order, lengths, 2000)]


@settings(max_examples=200, deadline=None)
@given(families())
def test_a_forest_holds_every_row(rows):
    alike = beginnings_of(rows)
    rows = [rows[at] for at in alike.order]
    forest = forest_of([len(row) for row in rows], alike.shared.tolist())
    ids = np.full(sum(forest.segments), -1)
    positions = np.array(positions_of(forest.segments, forest.parents))
    for row, places in zip(rows, forest.rows, strict=True):
        assert ((ids[places] == -1) | (ids[places] == row)).all()
        ids[places] = row
        assert positions[places].tolist() == list(range(len(row)))
    assert sum(forest.segments) == sum(map(len, rows)) - alike.shared.sum()
    assert min(forest.segments) > 0


def test_the_segments_of_a_small_forest():
    forest = forest_of([5, 4, 3], [0, 3, 2])
    assert forest.segments == [2, 1, 2, 1, 1]
    assert forest.parents == [-1, 0, 1, 1, 0]
    assert [places.tolist() for places in forest.rows] == [[0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 6]]


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_that_is_another_ones_beginning_needs_no_segment(count):
    forest = forest_of([3, *[5] * count], [0, 3, *[5] * (count - 1)])
    assert forest.segments == [3, 2]
    assert [places.tolist() for places in forest.rows] == [[0, 1, 2], *[[0, 1, 2, 3, 4]] * count]
