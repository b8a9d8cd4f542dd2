"""Attention in strips of a card's sizes: the values of a CPU's, and what is computed at once."""

from __future__ import annotations

import pytest
import torch
from pretended import Card, OnCard, on_host

from lowrank.attention import stacking, strips
from lowrank.attention.segmentwise import attend_spans
from lowrank.attention.spans import Spans, from_lengths
from lowrank.attention.strips import Rule

SPANS = {
    "one": lambda window: from_lengths([150], window),
    "pack": lambda window: from_lengths([130, 3, 129, 40, 1, 128], window),
    "padded": lambda window: Spans(3, 70, ((0, 70), (75, 140), (140, 141)), window),
    "forest": lambda window: from_lengths([70, 9, 9, 90, 1, 30, 33, 2], window, (-1, 0, 0, 1, 3, -1, 5, 5)),
}


def inputs(tokens, heads, key_heads):
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, heads, 8), (tokens, key_heads, 8), (tokens, key_heads, 4), (heads,)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def computed(tensors, spans, rule):
    """The output, and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attend_spans(*leaves, spans, rule)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize(("window", "scores"), [(None, 1 << 26), (None, 1 << 14), (20, 1 << 13), (100, 1 << 26)])
@pytest.mark.parametrize("spans", SPANS)
def test_values_are_a_cpus(spans, window, scores, monkeypatch):
    """With a small room for scores strips are cut shorter than a span asks for, and pairs are parted."""
    monkeypatch.setattr(strips, "CARD_SHORTEST", 32)
    monkeypatch.setattr(strips, "STRIP", 16)
    monkeypatch.setattr(strips, "CARD_SCORES", scores)
    spans, rule = SPANS[spans](window), Rule(0.7, window, 1.5)
    tensors = inputs(spans.batch * spans.length, 6, 2)
    expected = computed(tensors, spans, rule)
    with Card() as card:
        found = [on_host(x) for x in computed([OnCard(x) for x in tensors], spans, rule)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not card.waits
    assert not card.pageable


@pytest.mark.parametrize("length", [100, 512, 3000, 40_000])
@pytest.mark.parametrize("window", [None, 128, 1024])
def test_sizes(length, window):
    """Few strips while they fit, no more scores at once than there is room for, and no window with mostly hidden keys."""
    with Card(held_on="meta"):
        q = torch.empty(64, length, 4, 128, device="cuda:0")
        parts = list(strips._strips(q, length, window))
    for pairs, queries, keys in parts:
        at_once = (pairs.stop - pairs.start) * (queries.stop - queries.start) * 4 * (keys.stop - keys.start)
        assert at_once <= strips.CARD_SCORES
        if window is not None:
            assert keys.stop - keys.start <= 1.5 * window + 3 * strips.STRIP
    if length <= 512 and window is None:
        assert len(parts) == -(-length // max(strips.CARD_SHORTEST, length // strips.CARD_STRIPS))
    assert sum((p.stop - p.start) * (q.stop - q.start) for p, q, _ in parts) == 64 * length


def test_a_card_stacks_spans_that_a_cpu_keeps_apart():
    lengths = [300 - 7 * n for n in range(30)]
    spans, members = from_lengths(lengths, None), tuple(range(30))
    on_host = stacking.stacks_of(spans, stacking.Layout(torch.device("cpu"), 4096), members)
    with Card():
        on_card = stacking.stacks_of(spans, stacking.Layout(torch.device("cuda:0"), 4096), members)
    assert len(on_host) > 3 * len(on_card)
    assert sum(stack.count for stack in on_card) == 30
