"""Spans side by side, so that one matrix product serves them all, where that costs less than one for each.

    tokens of a pack     a a a b b c c c          stack   a a a
                                             ->           c c c         and   b b

A stack is as long as its longest span, rounded up. A shorter one is filled up with repeats of its last token: causal
attention of the real tokens cannot see what comes after them, and what is computed for the fill is thrown away.

Why round, and why stacks of few sizes: for 16-bit matrix products on CPU oneDNN compiles a kernel for each shape and
stride it meets, a millisecond and 0.7 MiB each, and keeps a thousand. Packs of ever new lengths would fill that.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any
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
        length: Tokens of the longest, rounded up.
        run: (start, end) of the tokens when they are one unfilled run in order: then no index is needed.
        source: (count * length,) the token to read at each place.
        target: The same with the number of tokens, one past the last, at each fill.
        fill: Places that are fill.
    """

    count: int
    length: int
    run: tuple[int, int] | None
    source: torch.Tensor
    target: torch.Tensor
    fill: torch.Tensor


_KEPT: WeakKeyDictionary[Spans, dict[tuple[torch.device, int], list[Stack]]] = WeakKeyDictionary()


def stacks_of(spans: Spans, device: torch.device, width: int) -> list[Stack]:
    """All spans in stacks, longest first; kept as long as the spans, since every layer asks for the same.

    Args:
        spans: Not none.
        device: Where the indices shall be.
        width: Elements of a token's queries, which products take their time by.
    """
    kept = _KEPT.setdefault(spans, {})
    if (device, width) not in kept:
        kept[device, width] = _stacked(spans, device, width)
    return kept[device, width]


def _stacked(spans: Spans, device: torch.device, width: int) -> list[Stack]:
    order = sorted(spans.spans, key=lambda span: (span[0] - span[1], span[0]))
    stacks, first = [], 0
    for count in _counts([end - start for start, end in order], width):
        stacks.append(_stack(order[first : first + count], spans.batch * spans.length, device))
        first += count
    return stacks


def _counts(lengths: list[int], width: int) -> list[int]:
    """How many of the spans, whose lengths fall, go into each stack: what costs least in all."""
    rest = [(0, 0)]  # of the last spans, none of them first: the least cost, and how many go into the first stack
    for first in reversed(range(len(lengths))):
        one = lengths[first] ** 2 * width
        ways = [(OVERHEAD + count * one + rest[-count][0], count) for count in TOGETHER if count <= len(rest)]
        rest.append(min(ways))
    counts = []
    while len(rest) > 1:
        counts.append(rest[-1][1])
        del rest[-counts[-1] :]
    return counts


def _stack(members: list[tuple[int, int]], tokens: int, device: torch.device) -> Stack:
    length = -(-(members[0][1] - members[0][0]) // GRAIN) * GRAIN
    starts, ends = torch.tensor(members).unbind(-1)
    place = starts[:, None] + torch.arange(length)
    fill = place >= ends[:, None]
    source = place.minimum(ends[:, None] - 1).flatten()
    target = place.masked_fill(fill, tokens).flatten()
    in_order = all(one[1] == following[0] for one, following in pairwise(members))
    run = (members[0][0], members[-1][1]) if in_order and not bool(fill.any()) else None
    filled = fill.flatten().nonzero().flatten()
    return Stack(len(members), length, run, source.to(device), target.to(device), filled.to(device))


class Gather(torch.autograd.Function):
    """x (tokens, h, d) -> one (count * key_heads, length, h / key_heads, d) for each stack."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stacks: list[Stack], key_heads: int) -> tuple[torch.Tensor, ...]:
        """Read the stacks."""
        ctx.stacks, ctx.shape = stacks, x.shape
        return tuple(_read(x, stack, key_heads) for stack in stacks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Write the stacks' gradients back; the fills' are 0."""
        return _write(grads, ctx.stacks, ctx.shape), None, None


class Scatter(torch.autograd.Function):
    """The inverse of `Gather`: the stacks' (count * key_heads, length, g, d) -> (tokens, h, d), 0 at padding."""

    @staticmethod
    def forward(ctx: Any, tokens: int, stacks: list[Stack], *parts: torch.Tensor) -> torch.Tensor:
        """Write the stacks."""
        key_heads = parts[0].shape[0] // stacks[0].count
        ctx.stacks, ctx.key_heads = stacks, key_heads
        return _write(parts, stacks, (tokens, key_heads * parts[0].shape[2], parts[0].shape[3]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Read the stacks' gradients, 0 at the fills."""
        return None, None, *(_read(grads[0], stack, ctx.key_heads, zero_fill=True) for stack in ctx.stacks)


def _read(x: torch.Tensor, stack: Stack, key_heads: int, zero_fill: bool = False) -> torch.Tensor:
    rows = x[stack.run[0] : stack.run[1]] if stack.run else x.index_select(0, stack.source)
    if zero_fill and len(stack.fill):
        rows.index_fill_(0, stack.fill, 0)
    rows = rows.unflatten(0, (stack.count, stack.length)).unflatten(2, (key_heads, -1)).transpose(1, 2)
    part = rows.new_empty(stack.count, key_heads, _capacity(stack.length), *rows.shape[3:])[:, :, : stack.length]
    return part.copy_(rows).flatten(0, 1)


def _capacity(length: int) -> int:
    """Room for `length` tokens of which the strides take few values: a power of two."""
    return max(256, 1 << (length - 1).bit_length())


def _write(parts: tuple[torch.Tensor, ...], stacks: list[Stack], shape: tuple[int, ...]) -> torch.Tensor:
    tokens, heads, size = shape
    whole = parts[0].new_empty(tokens + 1, heads, size)
    if sum(stack.count * stack.length - len(stack.fill) for stack in stacks) < tokens:
        whole.zero_()
    for part, stack in zip(parts, stacks, strict=True):
        rows = part.unflatten(0, (stack.count, -1)).transpose(1, 2)
        if stack.run:
            whole[stack.run[0] : stack.run[1]].view(rows.shape).copy_(rows)
        else:
            whole.index_copy_(0, stack.target, rows.reshape(-1, heads, size))
    return whole[:-1]
