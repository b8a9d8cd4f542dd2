"""Which tokens belong together: an attention mask said as spans instead of a square.

transformers builds one mask per kind of layer and hands it to every layer. For causal attention over segments, padded
rows or chunks that mask is block-diagonal, and a block-diagonal causal mask is nothing but a list of spans:

    position  0 1 2 3 4 5            ■ . . . . .
    row       a a a b b -            ■ ■ . . . .
                                     ■ ■ ■ . . .      ->   Spans((0, 3), (3, 5))
                                     . . . ■ . .
                                     . . . ■ ■ .
                                     . . . . . .

A span may have a parent, whose tokens come before its own and are seen by them too, and so on up (`forest`): then two
examples with one beginning are three spans, and the beginning is computed once.

    a a b b c     parents of b and c: a       ■ . . . .
                                              ■ ■ . . .
                                              ■ ■ ■ . .
                                              ■ ■ ■ ■ .
                                              ■ ■ . . ■

Spans travel where the mask would (`SpansMask`): through the layers' arguments, hence through gradient checkpointing and
onto the thread that recomputes in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from lowrank.attention.forest import starts_of
from lowrank.ops.transfer import to_device

MaskFunction = Callable[..., torch.Tensor]


@dataclass(frozen=True, eq=False)
class Spans:
    """Stretches of tokens, each of which attends causally to itself, to its ancestors and to nothing else.

    Attributes:
        batch: Rows of the batch.
        length: Tokens of a row, padding included.
        spans: (start, end) of each span among the `batch * length` tokens read row by row, in order and disjoint.
            Tokens in no span are padding: their output is 0.
        window: A token sees itself and at most `window - 1` tokens before it, those of its ancestors counted; None: all
            before it in its span and its ancestors.
        parents: For each span the number of its parent, an earlier one of the same row, or -1; None: none has one.
    """

    batch: int
    length: int
    spans: tuple[tuple[int, int], ...]
    window: int | None = None
    parents: tuple[int, ...] | None = None

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each span."""
        return tuple(end - start for start, end in self.spans)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest span."""
        return max(self.lengths, default=0)

    @cached_property
    def full(self) -> bool:
        """Whether every token is in a span."""
        return sum(self.lengths) == self.batch * self.length

    @cached_property
    def before(self) -> tuple[int, ...]:
        """Tokens of each span's ancestors."""
        return tuple(starts_of(self.lengths, self.parents))

    @cached_property
    def bounded(self) -> bool:
        """Whether the window hides anything."""
        return self.window is not None and max(self.ends, default=0) > self.window

    def path(self, number: int) -> list[int]:
        """The ancestors of a span, the first of all first."""
        found: list[int] = []
        while self.parents is not None and (number := self.parents[number]) >= 0:
            found.append(number)
        return found[::-1]

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens of each span and its ancestors: the keys of its last token, but for a window."""
        return tuple(before + length for before, length in zip(self.before, self.lengths, strict=True))

    def offsets(self, device: torch.device) -> torch.Tensor:
        """Cumulative lengths (spans + 1,) int32, as variable-length kernels take them; kept per device."""
        return self._on(device, "offsets", lambda: _cumulative(self.lengths))

    def key_offsets(self, device: torch.device) -> torch.Tensor:
        """The same of `ends`."""
        return self._on(device, "key offsets", lambda: _cumulative(self.ends))

    def tokens(self, device: torch.device) -> torch.Tensor:
        """Positions (tokens in spans,) int64 of the tokens that are not padding; kept per device."""
        return self._on(device, "tokens", lambda: torch.cat([torch.arange(*span) for span in self.spans]))

    def paths(self, device: torch.device) -> torch.Tensor:
        """Positions (sum of `ends`,) int64 of each span's ancestors' tokens and its own; kept per device."""
        return self._on(device, "paths", lambda: torch.cat([self.example(n) for n in range(len(self.spans))]))

    def example(self, number: int) -> torch.Tensor:
        """Positions of the tokens of a span's ancestors and its own, in the order of an example."""
        return torch.cat([torch.arange(*self.spans[n]) for n in (*self.path(number), number)])

    def _on(self, device: torch.device, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if (device, name) not in self._kept:
            self._kept[device, name] = to_device(make(), device)
        return self._kept[device, name]

    def square(self, device: torch.device) -> torch.Tensor:
        """The same as a bool mask (batch, 1, length, length), True where a query sees a key."""
        sees = self.mask_function(device)
        rows = torch.arange(self.batch, device=device)[:, None, None, None]
        place = torch.arange(self.length, device=device)
        return sees(rows, 0, place[:, None], place)

    def mask_function(self, device: torch.device | str) -> MaskFunction:
        """The same as a function (batch_idx, head_idx, q_idx, kv_idx) -> bool, elementwise, of tensors on a device."""
        owner = torch.full((self.batch * self.length,), -1)
        position = torch.zeros_like(owner)
        for number, ((start, end), before) in enumerate(zip(self.spans, self.before, strict=True)):
            owner[start:end] = number
            position[start:end] = torch.arange(before, before + end - start)
        # One row and one column more for padding, whose owner is -1.
        kin = torch.eye(len(self.spans) + 1, dtype=torch.bool)
        kin[-1] = False
        for number in range(len(self.spans)):
            kin[number, self.path(number)] = True
        owner, position, kin = owner.to(device), position.to(device), kin.to(device)

        def sees(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
            query, key = row * self.length + query, row * self.length + key
            behind = position[query] - position[key]
            seen = kin[owner[query], owner[key]] & (behind >= 0)
            return seen if self.window is None else seen & (behind < self.window)

        return sees

    @cached_property
    def _kept(self) -> dict[tuple[torch.device, str], torch.Tensor]:
        return {}


def _cumulative(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


def from_lengths(lengths: Sequence[int], window: int | None, parents: Sequence[int] | None = None) -> Spans:
    """The spans of one pack whose segments have `lengths` tokens, and parents if any has one."""
    ends = list(accumulate(lengths))
    kept = tuple(parents) if parents is not None and max(parents) >= 0 else None
    return Spans(1, ends[-1], tuple(zip([0, *ends[:-1]], ends, strict=True)), window, kept)


def from_mask_function(
    mask_function: MaskFunction,
    real: torch.Tensor | None,
    batch: int,
    length: int,
    window: int | None,
    device: torch.device | str,
) -> Spans | None:
    """The spans that a transformers mask function describes, or None when it describes something else.

    The function, causal within windows, segments or chunks, is asked about O(length) pairs of positions: neighbours
    give the borders, and the pairs (token, first of its span), (token, token - window) and (token, last before its
    span) must answer as spans would. The host reads all answers at once: for a card it waits one time.

    Args:
        mask_function: `(batch_idx, head_idx, q_idx, kv_idx) -> bool`, elementwise, as in `transformers.masking_utils`.
        real: (batch, length) bool, False at padding; None: no padding.
        window: The size that the mask is local to, as transformers states it (a window or a chunk); None: not local.
    """
    rows = torch.arange(batch, device=device)[:, None]
    place = torch.arange(length, device=device)[None, :].expand(batch, -1)

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return mask_function(rows, 0, query, key).expand(batch, query.shape[-1])

    if real is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
    before, after = place[:, :-1], place[:, 1:]
    joined = torch.nn.functional.pad(sees(after, before) & real[:, 1:] & real[:, :-1], (1, 0))
    start = torch.where(joined, 0, place).cummax(dim=-1).values
    last_real = torch.where(real, place, -1).cummax(dim=-1).values
    outside = torch.nn.functional.pad(last_real[:, :-1], (1, 0), value=-1).gather(-1, start)
    leaks = real & (outside >= 0) & sees(place, outside.clamp(min=0))
    ahead = sees(before, after) & real[:, 1:] & real[:, :-1]
    wrong = ahead.any() | leaks.any() | (real & ~sees(place, place)).any()
    whole = (sees(place, start) | ~real).all()
    fits = whole if window is None else whole | _in_window(sees, place, start, real, window)
    kinds = real.to(torch.int8) + (real & ~joined)  # padding, a token, the first of its span
    told = torch.cat([torch.stack([~wrong & fits, whole]).to(torch.int8), kinds.flatten()]).cpu()
    if not told[0]:
        return None
    kinds = told[2:]
    heads = (kinds == 2).nonzero().flatten().tolist()
    sizes = torch.bincount((kinds == 2).cumsum(0)[kinds > 0] - 1).tolist() if heads else []
    spans = tuple((head, head + size) for head, size in zip(heads, sizes, strict=True))
    return Spans(batch, length, spans, None if told[1] else window)


def _in_window(
    sees: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    place: torch.Tensor,
    start: torch.Tensor,
    real: torch.Tensor,
    window: int,
) -> torch.Tensor:
    """Whether every token sees back to the start of its span, but no further than `window`."""
    nearest_hidden, farthest_seen = place - window, (place - window + 1).maximum(start)
    hidden = sees(place, nearest_hidden.clamp(min=0)) & (nearest_hidden >= start)
    return ((sees(place, farthest_seen) & ~hidden) | ~real).all()
