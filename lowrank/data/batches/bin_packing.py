"""Packing: examples into bins of a token budget, none split, as few bins as can be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Examples that packing sees at a time: enough to fill bins, few enough that who shares a pack changes by epoch.
WINDOW = 4096


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, budget: int) -> list[list[int]]:
    """Pack items into bins: longest first, each into the fullest bin that still has room.

    Which bins have how much room is kept as the bits of one integer, so finding the fullest takes a shift and a lowest
    set bit.

    Args:
        lengths: Tokens of each item, (n,), each at most `budget`.
        budget: Tokens in one bin.

    Returns:
        The bins, each a list of indices into `lengths`; indices that are equal in length keep their order.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    assert not len(sizes) or sizes.max() <= budget, f"an item of {sizes.max()} tokens in bins of {budget}"
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(budget + 1)]
    rooms = 0
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            place = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            bins[place].append(item)
        else:
            room, place = budget, len(bins)
            bins.append([item])
        left = room - size
        if not with_room[left]:
            rooms |= 1 << left
        with_room[left].append(place)
    return bins


def pack(order: np.ndarray, lengths: np.ndarray, budget: int, window: int = WINDOW) -> list[np.ndarray]:
    """Pack examples, window by window.

    Args:
        order: The examples in the order in which windows take them, (n,) indices into `lengths`.
        lengths: Tokens of each example.
        budget: Tokens in one pack.
        window: Examples that are packed together.

    Returns:
        The packs, each an array of example indices in the order in which `order` has them.
    """
    packs = []
    for begin in range(0, len(order), window):
        part = order[begin : begin + window]
        packs += [part[sorted(items)] for items in best_fit_decreasing(lengths[part], budget)]
    return packs
