"""Which kernel computes a span on a CPU: strips or torch's own.

Which is faster depends on the processor, the dtype and the length: torch's from 100 tokens on with one, from 20,000 on
with another. So each machine is asked, once for each doubling of the length.
"""

from __future__ import annotations

import math
import statistics
import time
from weakref import WeakKeyDictionary

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lowrank.attention.spans import Spans, from_lengths
from lowrank.attention.stacked import attend, gradients
from lowrank.attention.strips import Rule
from lowrank.storage.machine_figures import figure

SHORTEST = 96  # tokens; below, many spans at a time are faster everywhere
LONGEST = 32_768  # that is measured: from there on torch's kernel only gains
WORTH = 1.05  # what torch's kernel may take of the strips' time: its memory is a third of theirs, or less
DTYPES = torch.float32, torch.bfloat16
PACK = 2048  # tokens that are measured, of shorter spans
TRIES, LONG_ENOUGH = 5, 0.3  # seconds

_Asked = tuple[torch.dtype, int, int, int]
# As long as the spans, since every layer asks for the same.
_KEPT: WeakKeyDictionary[Spans, dict[_Asked, tuple[int, ...]]] = WeakKeyDictionary()


def by_torch(
    spans: Spans, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, rule: Rule
) -> tuple[int, ...]:
    """The spans that torch's kernel computes. It sees no ancestors; of spans that others continue it may be one.

    Args:
        spans: Of the tokens.
        q: (tokens, h, d).
        k: (tokens, h_kv, d).
        v: (tokens, h_kv, e).
        sinks: The layer's.
        rule: The layer's.
    """
    if q.device.type != "cpu" or q.dtype not in DTYPES or spans.longest < SHORTEST:
        return ()
    if sinks is not None or rule.window is not None or rule.softcap is not None or q.shape[-1] != v.shape[-1]:
        return ()
    kept, asked = _KEPT.setdefault(spans, {}), (q.dtype, q.shape[1] // k.shape[1], k.shape[1], q.shape[2])
    if asked not in kept:
        places = enumerate(zip(spans.before, spans.lengths, strict=True))
        kept[asked] = tuple(n for n, (before, length) in places if before == 0 and _pays(length, *asked))
    return kept[asked]


def _pays(length: int, dtype: torch.dtype, group: int, key_heads: int, d: int) -> bool:
    if length < SHORTEST:
        return False
    nearest = min(LONGEST, 1 << round(math.log2(length)))
    heads = key_heads if nearest <= PACK else 1  # of long spans one is as good as all, and sooner measured
    what = f"torch's attention to stacks, {dtype}, {heads} x {group} heads of {d}, {nearest} tokens"
    return figure(what, lambda: _ratio(nearest, dtype, group, heads, d)) <= WORTH


@torch.no_grad()
def _ratio(length: int, dtype: torch.dtype, group: int, key_heads: int, d: int) -> float:
    """Times of torch's kernel by the strips', forward and backward, the median of some tries.

    Without gradients and modes: a forward pass under way would take what is computed here for its own. And in its
    thread: another one's heap gives back what a run's keeps.
    """
    spans = from_lengths([length - n for n in range(max(1, PACK // length))], None)
    numbers = torch.Generator().manual_seed(0)  # a run's own draws are the same whether it measures or not
    shapes = [(spans.length, heads, d) for heads in (group * key_heads, group * key_heads, key_heads, key_heads)]
    grad, q, k, v = (torch.randn(shape, dtype=dtype, generator=numbers) for shape in shapes)
    inputs, rule = (q, k, v, None), Rule(d**-0.5, None, None)

    def seconds(by_torch: tuple[int, ...]) -> float:
        began = time.perf_counter()
        out, told = attend(inputs, spans, rule, by_torch)
        gradients(grad, inputs, [out, *told], spans, rule, by_torch)
        return time.perf_counter() - began

    every, ratios = tuple(range(len(spans.spans))), []
    with _disable_current_modes():
        if length <= PACK:  # the first time libraries compile, for longer than such a pack takes
            seconds(every), seconds(())
        began = time.perf_counter()
        while len(ratios) < TRIES and (not ratios or time.perf_counter() - began < LONG_ENOUGH):
            ratios.append(seconds(every) / seconds(()))
    return statistics.median(ratios)
