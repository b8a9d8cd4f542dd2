"""Which rows share a pack where beginnings are computed once: those that begin alike, as many as fit.

What that does to the order of rows: in a window of shuffled rows those that begin alike stand together as a family, at
the place of its first, and a family is cut into packs; so the rows of one pack may be more alike than drawn ones. Rows
are moved only where it pays: where what they have in common beyond a larger family is a tenth of a row. All else keeps
the shuffled order (and what rows that meet by chance have in common is computed once too). Packs come in a shuffled
order. So who shares a pack changes with the epoch, and the rows of a step of several packs are mixed as ever.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowrank.data.batches.beginnings import LEAST, Beginnings, worthwhile
from lowrank.data.batches.bin_packing import WINDOW, best_fit_decreasing

GROUPED = 0.1
"""Rows are moved together for a stretch that is so long, as a share of the rows' mean length."""
LOOK_AHEAD = 32
"""Rows of a family that are tried for the room that is left in a pack."""
UNFILLED = 0.25
"""Packs that a step may lack to be a whole number of them."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a pack holds at most.

    Attributes:
        computed: Tokens that go through the model, each shared beginning once.
        real: Tokens of its rows, each row's own; None for any number.
    """

    computed: int
    real: int | None = None

    def holds(self, computed: int, real: int) -> bool:
        """Whether so much fits."""
        return computed <= self.computed and (self.real is None or real <= self.real)

    def size(self, computed: int, real: int) -> int:
        """How much of it that takes, in parts of `computed`: by what is scarcer."""
        return computed if self.real is None else max(computed, -(-real * self.computed // self.real))


@dataclass(frozen=True, slots=True)
class Members:
    """Which rows a batch holds.

    Attributes:
        rows: Their indices, (m,).
        shared: How many tokens each begins with in common with the one before it, which are computed once, (m,); None
            where all are computed for each.
    """

    rows: np.ndarray
    shared: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)


def room_for(
    order: np.ndarray, lengths: np.ndarray, alike: Beginnings, computed: int, step: int | None, ranks: int
) -> Room:
    """The room of packs of which a step of so many real tokens takes a whole number.

    Args:
        order: Rows as they are drawn, (n,) indices into `lengths`; a window of them says how many fit into a pack.
        lengths: Tokens of each row.
        alike: What they begin with in common.
        computed: Tokens of a pack that go through the model at most.
        step: Tokens of a step's rows; None for no limit.
        ranks: Processes that share a step.
    """
    if step is None:
        return Room(computed)
    share = max(step // ranks, computed)
    packs = pack_forests(order, lengths, alike, Room(computed, share))
    if len(packs) == 1:
        return Room(computed, share)
    typical = float(np.median([lengths[pack.rows].sum() for pack in packs]))
    count = min(math.ceil(share / typical - UNFILLED), share // computed)  # packs are never quite full
    return Room(computed, share // max(count, 1))


def pack_forests(
    order: np.ndarray, lengths: np.ndarray, alike: Beginnings, room: Room, window: int = WINDOW
) -> list[Members]:
    """Packs rows, window by window, so that those with common beginnings share packs.

    Where no row begins as another one does, the packs are those of `packing.pack`.

    Args:
        order: The rows in the order in which windows take them, (n,) indices into `lengths`.
        lengths: Tokens of each row, each with room in a pack.
        alike: What they begin with in common.
        room: Of a pack.
        window: Rows that are packed together.

    Returns:
        The packs, each with its rows in the order of `alike`, in which neighbours share most.
    """
    packs = []
    for begin in range(0, len(order), window):
        part = order[begin : begin + window]
        drawn = _Window(part, lengths[part], alike)
        pieces = _pieces(drawn, room)
        for items in best_fit_decreasing([room.size(piece.computed, piece.real) for piece in pieces], room.computed):
            rows, shared = drawn.alike.among(np.array([row for item in items for row in pieces[item].rows]))
            packs.append(Members(part[rows], shared))
    return packs


class _Window:
    """Rows that are packed together, named by where they stand among them: 0 is the first that the shuffle gave.

    Attributes:
        lengths: Tokens of each.
        alike: What they begin with in common.
        places: Where each stands in `alike.order`.
    """

    def __init__(self, rows: np.ndarray, lengths: np.ndarray, alike: Beginnings) -> None:
        order = np.argsort(alike.places[rows])
        self.alike = Beginnings(order, np.argsort(order), alike.among(rows)[1])
        self.lengths: list[int] = lengths.tolist()
        self.places: list[int] = self.alike.places.tolist()
        self._least = [self.alike.shared.tolist()]  # of the 1, 2, 4, ... places from each on
        while (half := 2 ** (len(self._least) - 1)) < len(rows) / 2:
            known = np.array(self._least[-1])
            self._least.append(np.minimum(known[:-half], known[half:]).tolist())

    def new(self, row: int, taken: Sequence[int]) -> int:
        """A row's tokens that are in none of the rows at the `taken` places, which ascend."""
        place = self.places[row]
        at = bisect_left(taken, place)
        before = self._common(taken[at - 1], place) if at else 0
        behind = self._common(place, taken[at]) if at < len(taken) else 0
        return self.lengths[row] - max(before, behind)

    def _common(self, place: int, later: int) -> int:
        """What the rows at two places have in common."""
        level = (later - place).bit_length() - 1
        least = self._least[level]
        return min(least[place + 1], least[later + 1 - 2**level])


@dataclass(slots=True)
class _Piece:
    """Rows of one family that go into one pack, and what they take there."""

    rows: list[int]
    computed: int
    real: int


def _pieces(window: _Window, room: Room) -> list[_Piece]:
    """A window's families, cut into pieces that fit, in the order of each piece's first row."""
    worth_moving = max(LEAST, int(GROUPED * sum(window.lengths) / len(window.lengths)))
    moving = worthwhile(window.alike.shared, worth_moving)
    pieces = []
    for family in _families(window.alike.order.tolist(), moving.tolist()):
        if len(family) == 1:
            size = window.lengths[family[0]]
            pieces.append(_Piece(family, size, size))
            continue
        while family:
            piece, family = _cut(family, window, room)
            pieces.append(piece)
    return sorted(pieces, key=lambda piece: piece.rows[0])


def _cut(family: list[int], window: _Window, room: Room) -> tuple[_Piece, list[int]]:
    """The rows from a family's beginning on that fit into one pack, and the rest of it."""
    piece, taken, left = _Piece([], 0, 0), [], []
    for at, row in enumerate(family):
        computed = piece.computed + window.new(row, taken)
        real = piece.real + window.lengths[row]
        if room.holds(computed, real):
            piece.rows.append(row)
            piece.computed, piece.real = computed, real
            insort(taken, window.places[row])
            continue
        left.append(row)
        if len(left) == LOOK_AHEAD:
            return piece, [*left, *family[at + 1 :]]
    return piece, left


def _families(rows: Sequence[int], shared: Sequence[int]) -> list[list[int]]:
    """Families in the order of their first rows, and each family's rows and nested families in that order too.

    Args:
        rows: Sorted so that neighbours share most.
        shared: What each has in common with the one before it; families are found from it with a stack.
    """
    depths, children, stack = [0], [[]], [0]  # a child is (its first row, its node), the node -1 for a row itself

    def end() -> None:
        """The innermost open family has no more rows."""
        node = stack.pop()
        children[node].sort()
        children[stack[-1]].append((children[node][0][0], node))

    for row, depth in zip(rows, shared, strict=True):
        while depths[stack[-1]] > depth:
            end()
        if depths[stack[-1]] < depth:
            eldest = children[stack[-1]].pop()
            stack.append(len(depths))
            depths.append(depth)
            children.append([eldest])
        children[stack[-1]].append((row, -1))
    while len(stack) > 1:
        end()
    return [_flat(child, children) for child in sorted(children[0])]


def _flat(top: tuple[int, int], children: Sequence[list[tuple[int, int]]]) -> list[int]:
    """A tree's rows from left to right."""
    found, waiting = [], [top]
    while waiting:
        row, node = waiting.pop()
        if node < 0:
            found.append(row)
        else:
            waiting += reversed(children[node])
    return found
