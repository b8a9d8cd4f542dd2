"""A pack as a forest: rows that begin alike lie in it once as far as they do.

rows        a b c d e   a b c f   a b g        shared     0 3 2
segments    a b   c   d e   f   g              parents   -1 0 1 1 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Forest:
    """Rows cut into segments, those that several have in common once.

    Attributes:
        segments: Tokens of each segment, in the order of the pack.
        parents: For each the number of the one that it goes on from, an earlier one; -1: it is a beginning.
        starts: For each where in its rows it starts.
        first_rows: For each the first row that goes through it.
        rows: For each row where in the pack its tokens lie, (n,) each.
    """

    segments: list[int]
    parents: list[int]
    starts: list[int]
    first_rows: list[int]
    rows: list[np.ndarray]


def forest_of(lengths: Sequence[int], shared: Sequence[int]) -> Forest:
    """Cuts sorted rows into segments.

    Args:
        lengths: Tokens of each row.
        shared: How many each begins with in common with the row before it; 0 for the first. Rows that stand apart have
            the least in common of what stands between them.
    """
    forest = Forest([], [], [], [], [])
    spans: list[np.ndarray] = []  # of each segment its places in the pack
    path: list[tuple[int, int]] = []  # of the row at hand: (where a segment ends in it, the segment)
    tokens = 0
    for row, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        while path and path[-1][0] > common:
            path.pop()
        start = common
        for end in [*_parting(shared, row, length), length]:
            if end == start:  # nothing is left of a row that is another one's beginning
                continue
            forest.segments.append(end - start)
            forest.parents.append(path[-1][1] if path else -1)
            forest.starts.append(start)
            forest.first_rows.append(row)
            spans.append(np.arange(tokens, tokens + end - start))
            path.append((end, len(spans) - 1))
            tokens, start = tokens + end - start, end
        forest.rows.append(np.concatenate([spans[segment] for _, segment in path]))
    return forest


def _parting(shared: Sequence[int], row: int, length: int) -> list[int]:
    """Where later rows part from what a row adds to those before it, ascending."""
    found: list[int] = []
    for common in shared[row + 1 :]:
        if common <= shared[row]:
            break
        if common < (found[-1] if found else length):
            found.append(common)
    return found[::-1]
