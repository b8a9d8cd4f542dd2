"""What rows begin with in common: an order in which neighbours share as much as they can, and how much.

Rows are compared a block of tokens at a time, all at once, and only as long as they have not yet parted: rows that
share nothing cost one block, and hundreds of thousands of them take seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

LEAST = 16
"""Tokens that a shared stretch has at least."""

WIDEST = 256
"""Tokens that are looked at together where no row parts."""
_FACTORS = np.random.default_rng(0).integers(1, 2**63, LEAST // 2, dtype=np.uint64) | np.uint64(1)


@dataclass(frozen=True, slots=True)
class Beginnings:
    """n rows, sorted so that those with common beginnings stand side by side.

    Attributes:
        order: The rows, (n,) indices.
        places: Where each row stands in `order`, (n,).
        shared: How many tokens each row of `order` begins with in common with the one before it, (n,); 0 for the first.
            Between two places where rows part there are `LEAST` tokens or more: what parts earlier parts where that
            stretch begins.
    """

    order: np.ndarray
    places: np.ndarray
    shared: np.ndarray

    def among(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Some of the rows in this order, and what each shares with the one before it among them.

        Args:
            rows: (m,) indices, in any order, none of them twice; m ≥ 1.
        """
        places = np.sort(self.places[rows])
        shared = np.zeros(len(places), dtype=np.int64)
        if len(places) > 1:  # two rows share the least of what stands between them
            shared[1:] = np.minimum.reduceat(self.shared[: places[-1] + 1], places[:-1] + 1)
        return self.order[places], shared


def beginnings(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Beginnings:
    """Compares rows of tokens.

    Args:
        ids: All tokens, (T,) int32.
        starts: Where each row starts in `ids`, (n,).
        lengths: Tokens of each row, (n,).
    """
    order = np.arange(len(starts))
    shared = np.zeros(len(starts), dtype=np.int64)
    active, group = np.arange(len(starts)), np.zeros(len(starts), dtype=np.int64)  # places whose rows have not parted
    done, width = 0, LEAST
    while len(active) > 1:
        rows = order[active]
        at, left = starts[rows] + done, lengths[rows] - done
        together = group[1:] == group[:-1]
        if _go_on(ids, at, left, together, width):
            done, width = done + width, min(2 * width, WIDEST)
            continue
        width = LEAST
        block = _block(ids, at, left)
        placed = np.lexsort((block.view(np.uint64) @ _FACTORS, group))
        block, left = block[placed], left[placed]
        order[active] = rows[placed]
        equal = block[1:] == block[:-1]
        common = np.where(equal.all(1), LEAST, equal.argmin(1))
        common = np.minimum(common, np.minimum(left[1:], left[:-1]))
        shared[active[1:][together]] = done + common[together]
        goes_on = together & (common == LEAST)
        group = np.concatenate([[0], np.cumsum(~goes_on)])
        kept = np.concatenate([goes_on, [False]]) | np.concatenate([[False], goes_on])
        active, group, done = active[kept], group[kept], done + LEAST
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return Beginnings(order, places, worthwhile(shared))


def beginnings_of(rows: Sequence[np.ndarray]) -> Beginnings:
    """The same of rows that lie apart, each (n,) token ids."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ids = np.concatenate(rows) if len(rows) else np.zeros(0, dtype=np.int32)
    return beginnings(ids, np.cumsum(lengths) - lengths, lengths)


def _go_on(ids: np.ndarray, at: np.ndarray, left: np.ndarray, together: np.ndarray, width: int) -> bool:
    """Whether no row parts from those it is together with in its next `width` tokens, as within a system prompt."""
    if left.min() < width:
        return False
    block = sliding_window_view(ids, width)[at].view(f"V{4 * width}")[:, 0]
    return bool(((block[1:] == block[:-1]) | ~together).all())


def _block(ids: np.ndarray, at: np.ndarray, left: np.ndarray) -> np.ndarray:
    """The next tokens of each row, (n, LEAST) int32; -1 behind its end."""
    block = np.full((len(at), LEAST), -1, dtype=np.int32)
    whole = left >= LEAST
    if whole.any():
        block[whole] = sliding_window_view(ids, LEAST)[at[whole]]
    offsets = np.arange(LEAST)
    there = offsets < left[~whole, None]
    block[~whole] = np.where(there, ids[np.minimum(at[~whole, None] + offsets, len(ids) - 1)], -1)
    return block


def worthwhile(shared: np.ndarray, least: int = LEAST) -> np.ndarray:
    """Where sorted rows part, with places fewer than `least` tokens behind another one moved back to that one.

    Places where rows part are the inner nodes of a tree, found with a stack; from the root on, one that is too near to
    the nearest that stays above it gives way to it.
    """
    depths, above, stack = [0], [0], [0]
    nodes = []  # of each row: where it parts from the one before it
    for depth in shared.tolist():
        below = None
        while depths[stack[-1]] > depth:
            below = stack.pop()
            above[below] = stack[-1]
        if depths[stack[-1]] < depth:
            stack.append(len(depths))
            depths.append(depth)
            above.append(stack[-2])
            if below is not None:
                above[below] = stack[-1]
        nodes.append(stack[-1])
    kept = [0] * len(depths)
    for node in np.argsort(depths, kind="stable").tolist():
        parent = kept[above[node]]
        kept[node] = depths[node] if depths[node] - parent >= least else parent
    return np.array(kept, dtype=np.int64)[nodes]
