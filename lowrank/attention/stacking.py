"""Spans side by side, so that one matrix product serves them all, where that costs less than one for each.

    tokens of a pack     a a a b b c c c          stack   a a a
                                             ->           c c c         and   b b

A stack is as long as its longest span, rounded up. A shorter one is filled up with repeats of its last token: causal
attention of the real tokens cannot see what comes after them, and what is computed for the fill is thrown away.

Of spans with ancestors the keys are the whole path's, the queries the end of it: where the spans of a stack do not
begin at one position, or not at a multiple of the grain, the ancestors' last tokens are queries too, and are thrown
away as well.

Why round, and why stacks of few sizes: for 16-bit matrix products on CPU oneDNN compiles a kernel for each shape and
stride it meets, a millisecond and 0.7 MiB each, and keeps a thousand. Packs of ever new lengths would fill that.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch

from lowrank.attention.spans import Spans

TOGETHER = 1, 2, 4, 8  # spans in a stack
GRAIN = 16  # stacks' lengths are multiples of it
OVERHEAD = 1 << 25  # what a stack costs beside its products, in their multiplications; measured on two cores


@dataclass(frozen=True, eq=False)
class Stack:
    """Spans that are computed together.

    Attributes:
        count: How many.
        before: Keys before the first query.
        length: Queries of each, up to the longest's last token, rounded up.
        run: (start, end) of the tokens when they are one unfilled run in order, and have no ancestors: then no index is
            needed.
        source: (count * length,) the token to read a query from, at each place.
        target: The same with the number of tokens, one past the last, at each fill.
        fill: Places that are fill.
        keys: (count * (before + length),) the token to read a key from.
    """

    count: int
    before: int
    length: int
    run: tuple[int, int] | None
    source: torch.Tensor
    target: torch.Tensor
    fill: torch.Tensor
    keys: torch.Tensor


_Asked = tuple[torch.device, int, tuple[int, ...]]
_KEPT: WeakKeyDictionary[Spans, dict[_Asked, list[Stack]]] = WeakKeyDictionary()


def stacks_of(spans: Spans, device: torch.device, width: int, apart: tuple[int, ...] = ()) -> list[Stack]:
    """The spans in stacks, longest first; kept as long as the spans, since every layer asks for the same.

    Args:
        spans: Not none.
        device: Where the indices shall be.
        width: Elements of a token's queries, which products take their time by.
        apart: Spans that shall be in no stack.
    """
    kept, asked = _KEPT.setdefault(spans, {}), (device, width, apart)
    if asked not in kept:
        kept[asked] = _stacked(spans, *asked)
    return kept[asked]


def _stacked(spans: Spans, device: torch.device, width: int, apart: tuple[int, ...]) -> list[Stack]:
    places = list(zip(spans.before, spans.lengths, strict=True))
    members = sorted(set(range(len(places))) - set(apart))
    orders = [sorted(members, key=lambda n: (-places[n][1], -places[n][0], n))]
    if spans.parents is not None:
        orders.append(sorted(members, key=lambda n: (-places[n][0], -places[n][1], n)))
        orders.append(sorted(members, key=lambda n: (-sum(places[n]), -places[n][0], n)))
    plans = [(*_counts([places[n] for n in order], width), order) for order in orders]
    _, counts, order = min(plans)
    stacks, first = [], 0
    for count in counts:
        stacks.append(_stack(order[first : first + count], spans, device))
        first += count
    return stacks


def _counts(places: list[tuple[int, int]], width: int) -> tuple[int, list[int]]:
    """What the cheapest way costs, and how many of the spans, (tokens before it, tokens) each, go into each stack."""
    rest = [(0, 0)]  # of the last spans, none of them first: the least cost, and how many go into the first stack
    for first in reversed(range(len(places))):
        ways, before, end = [], places[first][0], 0
        for number, place in enumerate(places[first : first + TOGETHER[-1]]):
            before, end, count = min(before, place[0]), max(end, sum(place)), number + 1
            if count in TOGETHER:
                ways.append((OVERHEAD + count * (end * end - before * before) * width + rest[-count][0], count))
        rest.append(min(ways))
    cost, counts = rest[-1][0], []
    while len(rest) > 1:
        counts.append(rest[-1][1])
        del rest[-counts[-1] :]
    return cost, counts


def _stack(members: list[int], spans: Spans, device: torch.device) -> Stack:
    befores = torch.tensor([spans.before[n] for n in members])
    ends = befores + torch.tensor([spans.lengths[n] for n in members])
    before = int(befores.min()) // GRAIN * GRAIN
    length = -(-(int(ends.max()) - before) // GRAIN) * GRAIN
    place = torch.arange(before + length).expand(len(members), -1)
    rows = place.minimum(ends[:, None] - 1)
    keys = torch.stack([spans.example(n)[row] for n, row in zip(members, rows, strict=True)])
    source, place = keys[:, before:], place[:, before:]
    fill = (place < befores[:, None]) | (place >= ends[:, None])
    target = source.masked_fill(fill, spans.batch * spans.length)
    runs = [spans.spans[n] for n in members]
    in_order = all(one[1] == following[0] for one, following in pairwise(runs))
    run = (runs[0][0], runs[-1][1]) if in_order and before == 0 and not bool(fill.any()) else None
    filled = fill.flatten().nonzero().flatten()
    tensors = (source.flatten(), target.flatten(), filled, keys.flatten())
    return Stack(len(members), before, length, run, *(x.to(device) for x in tensors))
