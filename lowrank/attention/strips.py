"""Causal attention of a stack of spans in plain matrix products, with memory that grows with its length only.

Why not scaled_dot_product_attention: on CPU its bfloat16 backward pass on spans of a few hundred tokens runs at a
twentieth of the speed of the matrix products that it consists of, and it knows neither windows, soft-capping nor sinks.
Here a strip of queries meets all the keys that it may see:

    keys     0 .... before .... stop   one strip: scores = q @ k^T, hidden pairs to -inf,
    strip    ■ ■ ■ ■ ■ ■ ■ ■ . .       probabilities = softmax, output = probabilities @ v.
             ■ ■ ■ ■ ■ ■ ■ ■ ■ .       The backward pass computes the strip's probabilities again, so nothing of
             ■ ■ ■ ■ ■ ■ ■ ■ ■ ■       size (queries x keys) outlives its strip.

The queries are those of the last s tokens of a path; there may be further keys before them, of tokens whose queries
another stack has.

Names: n (span, key head) pairs, g query heads per key head, s queries of a span, t keys (t >= s, the last query's the
last), d and e head sizes of queries and keys and of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch

from lowrank.ops.precision import precise

STRIP = 64  # queries of a short span, in 32 bits
LONGEST_STRIP = 4 * STRIP
SCORES_AT_ONCE = 1 << 20
# A card's time is that of launches until it has much to do at once, and then its memory's: scores go through it a dozen
# times.
CARD_STRIPS = 4  # of a span: five eighths of the square are computed, where half of it counts
CARD_SHORTEST = 2 * STRIP
CARD_SCORES = 1 << 26


@dataclass(frozen=True)
class Rule:
    """What a layer asks of its attention.

    Attributes:
        scale: Factor of the scores.
        window: A token sees itself and at most `window - 1` tokens before it; None: all before it.
        softcap: c in c * tanh(score / c); None: none.
    """

    scale: float
    window: int | None
    softcap: float | None


Write: TypeAlias = Callable[[slice, slice, torch.Tensor], None]
"""Takes a strip's part (n', s', g, d) of a result (n, s, g, d): the pairs, the queries, and the part."""


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, rule: Rule, write: Write
) -> None:
    """q (n, s, g, d), k (n, t, d), v (n, t, e), sinks (n, g) or None; writes (n, s, g, e), each part once."""
    scaled_k, hidden = _scaled(k, rule.scale), {}
    for pairs, queries, keys in _strips(q, k.shape[1], rule.window):
        p, _ = _probabilities(q, scaled_k, sinks, pairs, queries, keys, rule, hidden)
        p = p[..., : keys.stop - keys.start].flatten(1, 2)
        write(pairs, queries, torch.bmm(p, v[pairs, keys]).unflatten(1, (-1, q.shape[2])))


def gradients(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    rule: Rule,
    write: Write,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Those of `attend`'s inputs, given its output's; the queries' are written, the others summed in 32 bits or more.

    Returns:
        Of k, of v, of the sinks.
    """
    scaled_k, hidden = _scaled(k, rule.scale), {}
    sums = precise(q.dtype)
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=sums) for x in (k, v))
    grad_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=sums)
    for pairs, queries, keys in _strips(q, k.shape[1], rule.window):
        grad_nre = grad[pairs, queries].flatten(1, 2)
        p, tanh = _probabilities(q, scaled_k, sinks, pairs, queries, keys, rule, hidden)
        grad_p = torch.bmm(grad_nre, v[pairs, keys].transpose(1, 2)).view(*p.shape[:3], -1)
        if grad_sinks is not None:
            grad_p = torch.nn.functional.pad(grad_p, (0, 1))
        grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
        if grad_sinks is not None:
            grad_sinks[pairs] += grad_s[..., -1].sum(1, dtype=sums)
            p, grad_s = p[..., :-1], grad_s[..., :-1]
        if tanh is not None:
            grad_s = grad_s * (1 - tanh * tanh)
        p, grad_s = p.flatten(1, 2), grad_s.flatten(1, 2)
        write(pairs, queries, torch.bmm(grad_s, scaled_k[pairs, keys]).unflatten(1, (-1, q.shape[2])))
        grad_k[pairs, keys] += torch.bmm(grad_s.transpose(1, 2), q[pairs, queries].flatten(1, 2))
        grad_v[pairs, keys] += torch.bmm(p.transpose(1, 2), grad_nre)
    return grad_k.mul_(rule.scale), grad_v, grad_sinks


def _strips(q: torch.Tensor, keys: int, window: int | None) -> Iterator[tuple[slice, slice, slice]]:
    """(pairs, queries, keys) whose sizes take few values (`stacking` says why), of a bounded number of scores each.

    The last strip first: it has the most keys, and each next one fits into the memory that the one before gave back.
    A single pair's strip may have more scores.
    """
    n, length, g, _ = q.shape
    on_host, before = q.device.type == "cpu", keys - length
    strip = _strip(length, q.element_size()) if on_host else _card_strip(length, g, keys, window)
    scores = SCORES_AT_ONCE if on_host else CARD_SCORES
    for first in reversed(range(0, length, strip)):
        last = min(first + strip, length)
        start = 0 if window is None else max(0, before + first - window + 1) // STRIP * STRIP
        seen = before + last - start
        stop = start + (min(_rounded(seen), keys - start) if on_host else seen)
        at_once = n
        while at_once > 1 and at_once * g * (last - first) * (stop - start) > scores:
            at_once = -(-at_once // 2)
        for pair in range(0, n, at_once):
            yield slice(pair, min(pair + at_once, n)), slice(first, last), slice(start, stop)


def _strip(length: int, bytes_each: int) -> int:
    """Queries at a time: what long ones compute in vain above the diagonal weighs less in long spans, and in 16 bits,
    where products take less of the time than all that is around them. Measured on two cores."""
    shortest = STRIP * (2 if bytes_each == 2 else 1)
    return min(LONGEST_STRIP, max(shortest, length // 16 // STRIP * STRIP))


def _card_strip(length: int, group: int, keys: int, window: int | None) -> int:
    """Queries at a time on a card, where `group` heads meet each key: at most half a window, since of longer strips'
    scores most would be hidden."""
    wanted = max(CARD_SHORTEST, -(-length // CARD_STRIPS // STRIP) * STRIP)
    if window is not None:
        wanted = min(wanted, max(CARD_SHORTEST, window // 2))
        keys = min(keys, window + wanted)
    return max(STRIP, min(wanted, CARD_SCORES // (group * keys)) // STRIP * STRIP)


def _rounded(keys: int) -> int:
    """Up to one of eight values for each doubling of the number of keys, once there are many."""
    step = max(1, (1 << (keys - 1).bit_length()) // 16) if keys > 16 * STRIP else 1
    return -(-keys // step) * step


def _scaled(k_nsd: torch.Tensor, scale: float) -> torch.Tensor:
    """k * scale, with the strides of k."""
    return torch.mul(
        k_nsd, scale, out=torch.empty_strided(k_nsd.shape, k_nsd.stride(), dtype=k_nsd.dtype, device=k_nsd.device)
    )


def _probabilities(
    q: torch.Tensor,
    scaled_k: torch.Tensor,
    sinks: torch.Tensor | None,
    pairs: slice,
    queries: slice,
    keys: slice,
    rule: Rule,
    hidden: _Hidden,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax over the keys and then the sink, if there is one; and tanh of the capped scores, if they are capped."""
    q_nrgd = q[pairs, queries]
    scores = torch.bmm(q_nrgd.flatten(1, 2), scaled_k[pairs, keys].transpose(1, 2)).view(*q_nrgd.shape[:3], -1)
    tanh = None
    if rule.softcap is not None:
        tanh = (scores / rule.softcap).tanh_()
        scores = tanh * rule.softcap
    before = scaled_k.shape[1] - q.shape[1]
    _hide(scores, slice(before + queries.start, before + queries.stop), keys, rule.window, hidden)
    if sinks is not None:
        sink = sinks[pairs, None, :, None].to(scores.dtype).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    return torch.softmax(scores, dim=-1), tanh


_Hidden: TypeAlias = dict[tuple[int, int], torch.Tensor]
"""By the sizes of a strip what hides the keys after a query, (queries, 1, keys from the first query on)."""


def _hide(scores: torch.Tensor, queries: slice, keys: slice, window: int | None, hidden: _Hidden) -> None:
    """Set the scores (n, queries, g, keys) of keys after a query, or before its window, to -inf.

    `queries` are places among the keys.
    """
    shape = queries.stop - queries.start, keys.stop - queries.start
    if shape not in hidden:
        later = torch.full(shape, float("-inf"), dtype=scores.dtype, device=scores.device)
        hidden[shape] = later.triu(1)[:, None]
    scores[..., queries.start - keys.start :] += hidden[shape]
    # The last query sees no key before `border`; of the strip's other queries each sees one further back.
    border = 0 if window is None else queries.stop - window - keys.start
    if window is not None and border > 0:
        query = torch.arange(queries.start, queries.stop, device=scores.device)[:, None, None]
        key = torch.arange(keys.start, keys.start + border, device=scores.device)
        scores[..., :border].masked_fill_(key <= query - window, float("-inf"))
