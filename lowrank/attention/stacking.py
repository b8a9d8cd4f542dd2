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
from weakref import WeakKeyDictionary

import torch

from lowrank.attention.spans import Spans
from lowrank.ops.transfer import to_device

TOGETHER = 1, 2, 4, 8  # spans in a stack
GRAIN = 16  # of strips' stacks
LEAST_ROOM = 256  # where places are handed out in powers of two
OVERHEAD = 1 << 25  # what a stack costs beside its products, in their multiplications; measured on two cores
CARD_TOGETHER = 1, 2, 4, 8, 16, 32, 64
# On a card, by the count: a hundred launches, while scores go through memory some twenty times.
CARD_OVERHEAD = 1 << 31


@dataclass(frozen=True)
class Layout:
    """How stacks lie in memory.

    Attributes:
        device: Where the indices shall be.
        width: Elements of a token's queries, which products take their time by.
        heads: Rows of each token, which are stacked apart.
        grain: Stacks' lengths are multiples of it.
        roomy: Whether there is room for powers of two, so that strides are of few sizes.
    """

    device: torch.device
    width: int
    heads: int = 1
    grain: int = 1
    roomy: bool = False


@dataclass(frozen=True, eq=False)
class Stack:
    """Spans that are computed together. In its indices n is count * heads, the heads of a span side by side.

    Attributes:
        count: How many.
        before: Keys before the first query.
        length: Queries of each, up to the longest's last token, rounded up.
        source: (n, room) the row to read a query from, at each place; of the room, `length` places count.
        target: (n, length) the row to write to, with rows past the last token at each fill.
        fill: Places among the source's, all rows in one, that are fill.
        keys: (n, room) the row to read a key from; `before + length` places count.
        run: (start, end) of the rows where they lie one after the other as the stack has them: no index is needed.
    """

    count: int
    before: int
    length: int
    source: torch.Tensor
    target: torch.Tensor
    fill: torch.Tensor
    keys: torch.Tensor
    run: tuple[int, int] | None


_Asked = tuple[Layout, tuple[int, ...]]
_KEPT: WeakKeyDictionary[Spans, dict[_Asked, list[Stack]]] = WeakKeyDictionary()


def stacks_of(spans: Spans, layout: Layout, members: tuple[int, ...]) -> list[Stack]:
    """Some of the spans in stacks, longest first; kept as long as the spans, since every layer asks for the same.

    Args:
        spans: All.
        layout: Of the stacks.
        members: Which are meant.
    """
    kept, asked = _KEPT.setdefault(spans, {}), (layout, members)
    if asked not in kept:
        kept[asked] = _stacked(spans, *asked)
    return kept[asked]


def _stacked(spans: Spans, layout: Layout, members: tuple[int, ...]) -> list[Stack]:
    places = list(zip(spans.before, spans.lengths, strict=True))
    orders = [sorted(members, key=lambda n: (-places[n][1], -places[n][0], n))]
    if spans.parents is not None:
        orders.append(sorted(members, key=lambda n: (-places[n][0], -places[n][1], n)))
        orders.append(sorted(members, key=lambda n: (-sum(places[n]), -places[n][0], n)))
    card = layout.device.type != "cpu"
    plans = [(*_counts([places[n] for n in order], layout.width, card), order) for order in orders]
    _, counts, order = min(plans)
    stacks, first = [], 0
    for count in counts:
        stacks.append(_stack(order[first : first + count], spans, layout))
        first += count
    return stacks


def _counts(places: list[tuple[int, int]], width: int, card: bool) -> tuple[int, list[int]]:
    """What the cheapest way costs, and how many of the spans, (tokens before it, tokens) each, go into each stack."""
    together, overhead = (CARD_TOGETHER, CARD_OVERHEAD) if card else (TOGETHER, OVERHEAD)
    rest = [(0, 0)]  # of the last spans, none of them first: the least cost, and how many go into the first stack
    for first in reversed(range(len(places))):
        ways, before, end = [], places[first][0], 0
        for number, place in enumerate(places[first : first + together[-1]]):
            before, end, count = min(before, place[0]), max(end, sum(place)), number + 1
            if count in together:
                ways.append((overhead + count * (end * end - before * before) * width + rest[-count][0], count))
        rest.append(min(ways))
    cost, counts = rest[-1][0], []
    while len(rest) > 1:
        counts.append(rest[-1][1])
        del rest[-counts[-1] :]
    return cost, counts


def _stack(members: list[int], spans: Spans, layout: Layout) -> Stack:
    grain, heads = layout.grain, layout.heads
    befores = torch.tensor([spans.before[n] for n in members])
    ends = befores + torch.tensor([spans.lengths[n] for n in members])
    before = int(befores.min()) // grain * grain
    length = -(-(int(ends.max()) - before) // grain) * grain
    place = torch.arange(before + length).expand(len(members), -1)
    rows = place.minimum(ends[:, None] - 1)
    keys = torch.stack([spans.example(n)[row] for n, row in zip(members, rows, strict=True)])
    source, place = keys[:, before:], place[:, before:]
    fill = (place < befores[:, None]) | (place >= ends[:, None])
    target = _by_heads(source.masked_fill(fill, spans.batch * spans.length), heads)
    source, keys = (_roomy(_by_heads(x, heads), layout.roomy) for x in (source, keys))
    filled = torch.zeros_like(source, dtype=torch.bool)
    filled[:, :length] = fill.repeat_interleave(heads, 0)
    in_order = before == 0 and bool((keys.flatten().diff() == 1).all())
    run = (int(keys[0, 0]), int(keys[-1, -1]) + 1) if in_order else None
    places = filled.flatten().nonzero().flatten()
    source, target, places, keys = (to_device(x, layout.device) for x in (source, target, places, keys))
    return Stack(len(members), before, length, source, target, places, keys, run)


def _by_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """Tokens (count, places) -> their rows (count * heads, places)."""
    return (tokens[:, None] * heads + torch.arange(heads)[:, None]).flatten(0, 1)


def _roomy(rows: torch.Tensor, roomy: bool) -> torch.Tensor:
    """With the last place repeated up to a power of two."""
    places = rows.shape[1]
    room = max(LEAST_ROOM, 1 << (places - 1).bit_length()) if roomy else places
    return torch.cat([rows, rows[:, -1:].expand(-1, room - places)], dim=1)
