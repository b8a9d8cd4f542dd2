"""Long spans on a CPU: torch's own causal kernel, where it is as fast as strips.

It keeps no row of scores, so its memory hardly grows; but it knows neither windows, soft-capping nor sinks, and on
spans of a few hundred tokens it may run at half of the strips' speed, or less. From which length on it is the faster
depends on the processor and the dtype: 700 tokens on one, 20,000 on another. So each machine is asked, once for each
doubling of the length, with one key head of the many that a layer has.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

from lowrank.attention import strips
from lowrank.attention.spans import Spans
from lowrank.attention.strips import Rule
from lowrank.storage.machine_figures import figure

SHORTEST = 512  # below, strips of several spans at a time are faster everywhere
WORTH = 1.05  # what torch's kernel may take of the strips' time: its memory is a third of theirs, or less
LONGEST = 32_768  # that is measured: from there on torch's kernel only gains
DTYPES = torch.float32, torch.bfloat16
TRIES, LONG_ENOUGH = 5, 0.3  # seconds

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def apart(
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
    group, d = q.shape[1] // k.shape[1], q.shape[2]
    places = enumerate(zip(spans.before, spans.lengths, strict=True))
    return tuple(n for n, (before, length) in places if before == 0 and _pays(length, q.dtype, group, d))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A span's q (s, h, d), k and v (s, h_kv, d) -> (s, h, d), and the logarithms of the sums of its softmax."""
    out, log_sums = _forward(*(x.transpose(0, 1)[None] for x in (q, k, v)), 0.0, True, scale=scale)
    return out[0].transpose(0, 1), log_sums


def gradients(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    scale: float,
) -> list[torch.Tensor]:
    """Those of `attend`'s q, k and v, given its output's (s, h, d)."""
    inputs = (x.transpose(0, 1)[None] for x in (grad, q, k, v, out))
    return [part[0].transpose(0, 1) for part in _backward(*inputs, log_sums, 0.0, True, scale=scale)]


def _pays(length: int, dtype: torch.dtype, group: int, d: int) -> bool:
    if length < SHORTEST:
        return False
    nearest = min(LONGEST, 1 << round(math.log2(length)))
    what = f"torch's attention to strips, {dtype}, {group} heads of {d}, {nearest} tokens"
    return figure(what, lambda: _ratio(nearest, dtype, group, d)) <= WORTH


def _ratio(length: int, dtype: torch.dtype, group: int, d: int) -> float:
    """Times of torch's kernel by the strips', forward and backward, over one key head, the median of some tries."""
    numbers = torch.Generator().manual_seed(0)  # a run's own draws are the same whether it measures or not
    q, grad, k, v = (torch.randn(length, heads, d, dtype=dtype, generator=numbers) for heads in (group, group, 1, 1))
    rule = Rule(d**-0.5, None, None)
    stack = q[None], k[None, :, 0], v[None, :, 0]

    def torchs() -> None:
        gradients(grad, q, k, v, *attend(q, k, v, rule.scale), rule.scale)

    def stripped() -> None:
        strips.attend(*stack, None, rule)
        strips.gradients(grad[None], *stack, None, rule)

    began, ratios = time.perf_counter(), []
    while len(ratios) < TRIES and (not ratios or time.perf_counter() - began < LONG_ENOUGH):
        ratios.append(_seconds(torchs) / _seconds(stripped))
    return statistics.median(ratios[1:] or ratios)


def _seconds(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began
