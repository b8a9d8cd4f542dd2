"""Packs whose segments have parents: where their tokens stand in the examples that they are the beginnings and ends of.

segment     a a a   b b   c c c   d          examples  a b,  a c d
parent      -1      0     0       2
position    0 1 2   3 4   3 4 5   6
"""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.errors import InputError


def starts_of(lengths: Sequence[int], parents: Sequence[int] | None) -> list[int]:
    """The position of each segment's first token in its examples: how many tokens its ancestors have.

    Args:
        lengths: Tokens of each segment, in the order of the pack.
        parents: For each segment the number of the one whose tokens come before its own, which must be an earlier
            one; -1: none do. None: -1 for all.

    Raises:
        InputError: A parent that is no earlier segment, or not one parent for each segment.
    """
    if parents is None:
        return [0] * len(lengths)
    wrong = [number for number, parent in enumerate(parents) if not -1 <= parent < number]
    if wrong or len(parents) != len(lengths):
        what = (
            f"segment {wrong[0]} has the parent {parents[wrong[0]]}" if wrong else f"there are {len(parents)} parents"
        )
        raise InputError(
            f"{what} in a pack of {len(lengths)} segments",
            fix="Give each segment the number of an earlier one, or -1.",
        )
    starts: list[int] = []
    for parent in parents:
        starts.append(0 if parent < 0 else starts[parent] + lengths[parent])
    return starts


def positions_of(lengths: Sequence[int], parents: Sequence[int] | None = None) -> list[int]:
    """The position_ids of a pack: each token's position in its examples; arguments as `starts_of`'s."""
    starts = starts_of(lengths, parents)
    return [place for start, length in zip(starts, lengths, strict=True) for place in range(start, start + length)]
