"""Spans against the square masks that transformers builds from the same mask functions."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils

from lowrank.attention import stacking
from lowrank.attention.mask import SpansMask
from lowrank.attention.spans import Spans, from_lengths, from_mask_function
from lowrank.attention.stacked import StackedAttention
from lowrank.attention.stacking import Layout, stacks_of
from lowrank.attention.strips import Rule

CPU = torch.device("cpu")


def _square(mask_function, real, batch, length) -> torch.Tensor:
    """transformers' own mask, without the rows of padding, which see what does not matter."""
    mask = masking_utils.sdpa_mask(
        batch, length, length, mask_function=mask_function, attention_mask=real, allow_is_causal_skip=False
    )
    return mask if real is None else mask & real[:, None, :, None]


def _packed(base, lengths: list[int]):
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return masking_utils.and_masks(
        masking_utils.packed_sequence_mask_function(masking_utils.find_packed_sequence_indices(positions)), base
    )


CAUSAL = masking_utils.causal_mask_function


@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 100])
@pytest.mark.parametrize("lengths", [[9], [4, 5], [1, 1, 7], [3, 1, 3, 2], [5, 4]])
def test_packs(lengths, window):
    base = CAUSAL if window is None else masking_utils.sliding_window_causal_mask_function(window)
    mask_function = base if len(lengths) == 1 else _packed(base, lengths)
    spans = from_mask_function(mask_function, None, 1, 9, window, CPU)
    assert spans is not None
    assert torch.equal(spans.square(CPU), _square(mask_function, None, 1, 9))
    if window != 1:  # a window of 1 is spans of 1, whatever the segments are
        assert spans.lengths == tuple(lengths)
        assert torch.equal(from_lengths(lengths, window).square(CPU), spans.square(CPU))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunk", [None, 4])
def test_padded_rows(window, chunk):
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0]])
    real = real.bool()
    if chunk is not None:
        left = (real.cumsum(-1) == 0).sum(-1)
        mask_function, local = masking_utils.chunked_causal_mask_function(chunk, left), chunk
    else:
        mask_function = CAUSAL if window is None else masking_utils.sliding_window_causal_mask_function(window)
        local = window
    spans = from_mask_function(mask_function, real, 4, 7, local, CPU)
    assert spans is not None
    assert torch.equal(spans.square(CPU), _square(mask_function, real, 4, 7))


def test_a_row_without_a_real_token_is_no_span():
    real = torch.tensor([[True, True], [False, False]])
    spans = from_mask_function(CAUSAL, real, 2, 2, None, CPU)
    assert spans is not None
    assert spans.spans == ((0, 2),)
    assert not spans.full


def test_masks_that_are_not_spans_are_left_alone():
    holes = torch.tensor([[True, True, False, True, True]])
    prefix = masking_utils.or_masks(CAUSAL, lambda b, h, q, k: (q < 3) & (k < 3))
    blocks = masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, 1, 1]])))
    both_ways = masking_utils.bidirectional_mask_function
    assert from_mask_function(CAUSAL, holes, 1, 5, None, CPU) is None
    for mask_function in (prefix, blocks, both_ways):
        assert from_mask_function(mask_function, None, 1, 5, None, CPU) is None
    # A window that is not the one which transformers states.
    wrong = masking_utils.sliding_window_causal_mask_function(2)
    assert from_mask_function(wrong, None, 1, 5, 3, CPU) is None
    assert from_mask_function(wrong, None, 1, 5, None, CPU) is None


def test_a_spans_mask_is_a_tensor_with_the_square_s_values():
    spans = Spans(2, 4, ((0, 4), (5, 7)), window=2)
    mask, square = SpansMask(spans, CPU), spans.square(CPU)
    assert isinstance(mask, torch.Tensor)
    assert mask.shape == square.shape == (2, 1, 4, 4)
    assert mask.dtype == torch.bool
    assert mask.contiguous() is mask
    assert mask.detach().spans is spans
    assert torch.equal(mask[:, :, :, :3], square[:, :, :, :3])
    assert torch.equal(~mask, ~square)
    assert torch.equal(mask.to(torch.float32), square.float())
    assert mask.sum() == square.sum()
    assert not isinstance(mask & square, SpansMask)


@pytest.mark.parametrize(
    ("lengths", "parents"),
    [
        ([3, 3, 3], None),
        ([10, 9, 2, 1, 2], None),
        ([1], None),
        ([8, 7, 8, 100, 6], None),
        ([20, 5, 4, 16, 40, 33, 1], (-1, 0, 0, 1, 0, -1, 3)),
    ],
)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("grain", [1, 16])
@pytest.mark.parametrize("roomy", [False, True])
def test_stacks_have_every_token_once_and_its_path_before_it(lengths, parents, heads, grain, roomy):
    spans = from_lengths(lengths, None, parents)
    stacks = stacks_of(spans, Layout(CPU, 1, heads, grain, roomy), tuple(range(len(lengths))))
    assert sum(stack.count for stack in stacks) == len(lengths)
    seen = spans.square(CPU)[0, 0]
    found = []
    for stack in stacks:
        assert stack.before % grain == stack.length % grain == 0
        rows = range(stack.count * heads)
        for number in rows:
            for place, row in enumerate(stack.target[number].tolist()):
                token, head = divmod(row, heads)
                assert head == number % heads
                if token < sum(lengths):
                    keys = (stack.keys[number, : stack.before + place + 1] - head) // heads
                    assert keys.tolist() == seen[token].nonzero()[:, 0].tolist()
                    assert int(stack.source[number, place]) == row
                    found.append(row)
        if stack.run:
            assert stack.source.flatten().tolist() == stack.keys.flatten().tolist() == list(range(*stack.run))
        fill = (stack.target >= heads * sum(lengths)).nonzero().tolist()
        room = stack.source.shape[1]
        assert stack.fill.tolist() == [row * room + place for row, place in fill]
        assert (room & (room - 1) == 0 and room >= stacking.LEAST_ROOM) if roomy else room == stack.length
    assert sorted(found) == list(range(heads * sum(lengths)))


@pytest.mark.parametrize("width", [64, 576, 4096])
def test_the_stacks_are_those_that_cost_least(width):
    def ways(lengths):
        """Every way to stack."""
        yield from ([()] if not lengths else [])
        for count in stacking.TOGETHER:
            if count <= len(lengths):
                yield from ((count, *rest) for rest in ways(lengths[count:]))

    def cost(counts):
        firsts = [sum(counts[:number]) for number in range(len(counts))]
        products = sum(count * lengths[first] ** 2 for count, first in zip(counts, firsts, strict=True))
        return len(counts) * stacking.OVERHEAD + products * width

    lengths = [400, 390, 200, 190, 120, 100, 96, 90, 40, 12, 3]
    spans = from_lengths(lengths, None)
    counts = [stack.count for stack in stacks_of(spans, Layout(CPU, width), tuple(range(11)))]
    assert cost(counts) == min(map(cost, ways(lengths)))
    assert 1 < len(counts) < len(lengths)


def test_spans_that_begin_where_others_do_share_a_stack():
    """What stands before is a reason to stack: two families of four, and their roots."""
    spans = from_lengths([320, 330, *[40, 20] * 4], None, (-1, -1, *[0, 1] * 4))
    stacks = stacks_of(spans, Layout(CPU, 576, grain=stacking.GRAIN), tuple(range(10)))
    assert [(stack.count, stack.before, stack.length) for stack in stacks] == [(2, 0, 336), (8, 320, 48)]


def test_stacks_leave_padding_at_zero():
    spans = Spans(2, 4, ((1, 4), (4, 6)))
    x = torch.ones(8, 1, 2, requires_grad=True)
    out = StackedAttention.apply(x, x, x, None, spans, Rule(1.0, None, None))
    expected = torch.tensor([0.0, 1, 1, 1, 1, 1, 0, 0])[:, None, None].expand(8, 1, 2)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    torch.testing.assert_close((x.grad != 0), expected != 0)
