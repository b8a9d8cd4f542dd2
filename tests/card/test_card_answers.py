"""Answers on a card: the CPU's own, and what each token asks of the host."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from architectures import MODELS
from pretended import Card, on_card
from tiny import VOCAB, tiny_llama
from transformers import GenerationConfig

from lowrank.attention import set_attention
from lowrank.training.evaluation.greedy import continue_rows

PROMPTS = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 4, 13)]

# Of a token of three rows through each layer, counted, and a twentieth more.
LAUNCHES_OF_A_LAYER = 43
# All rows' tokens are read.
WAITS_OF_A_TOKEN = 1
# Which tokens of the prompts are padding: of the mask, or (sdpa) whether any is and whether any stands before others.
WAITS_OF_PROMPTS = {"auto": 1, "sdpa": 2}


def answered(card, new_tokens, ends=(), model=tiny_llama, attention="auto"):
    model = model().eval()
    if card is not None:
        on_card(model)
    set_attention(model, attention, packing=True)
    if card is not None:
        card.clear()
    config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=list(ends), pad_token_id=0)
    with torch.no_grad():
        return continue_rows(model, PROMPTS, config)


def of_tokens(layers):
    """Launches of five tokens more."""
    counts = []
    for new_tokens in (3, 8):
        with Card() as card:
            answered(card, new_tokens, model=partial(tiny_llama, num_hidden_layers=layers))
        counts.append(card.launches)
    return counts[1] - counts[0]


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_waits(attention):
    expected = answered(None, 8, attention=attention)
    with Card() as card:
        assert answered(card, 8, attention=attention) == expected
    assert len(card.waits) <= WAITS_OF_PROMPTS[attention] + 8 * WAITS_OF_A_TOKEN, card.waits
    assert not card.pageable


def test_windows_that_slide():
    """Layers with a window have a mask of their own, of which padding is asked once, too."""
    expected = answered(None, 12, model=MODELS["gemma2"])
    with Card() as card:
        assert answered(card, 12, model=MODELS["gemma2"]) == expected
    copies = [wait for wait in card.waits if "lazy_initialization" in wait]  # transformers' own, one a layer
    assert len(card.waits) <= 2 * WAITS_OF_PROMPTS["auto"] + 2 + 12 * WAITS_OF_A_TOKEN, card.waits
    assert len(copies) <= 2


def test_launches_of_a_layer():
    assert (of_tokens(layers=4) - of_tokens(layers=2)) / 2 / 5 <= LAUNCHES_OF_A_LAYER


def test_rows_that_end_leave_the_others():
    ends = [answered(None, 8)[1][2]]
    expected = answered(None, 8, ends)
    assert len({len(answer) for answer in expected}) > 1
    with Card() as card:
        assert answered(card, 8, ends) == expected
    assert len(card.waits) <= WAITS_OF_PROMPTS["auto"] + 8 * WAITS_OF_A_TOKEN, card.waits
