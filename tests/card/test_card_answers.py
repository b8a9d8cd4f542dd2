"""Answers on a card: the CPU's own, and what each token asks of the host."""

from __future__ import annotations

import pytest
import torch
from pretended import Card, on_card
from tiny import VOCAB, tiny_llama
from transformers import GenerationConfig

from lowrank.attention import set_attention
from lowrank.training.evaluation.greedy import continue_rows

PROMPTS = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 4, 13)]

# Of a token of three rows through each layer, counted, and a twentieth more.
LAUNCHES_OF_A_LAYER = 43
# The token is read, and transformers reads whether its mask holds padding (`_ignore_causal_mask_sdpa`).
WAITS_OF_A_TOKEN = 2


def answered(card, new_tokens, ends=(), layers=2, attention="auto"):
    model = tiny_llama(num_hidden_layers=layers).eval()
    if card is not None:
        on_card(model)
    set_attention(model, attention, packing=True)
    if card is not None:
        card.clear()
    config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=list(ends), pad_token_id=0)
    with torch.no_grad():
        return continue_rows(model, PROMPTS, config)


def of_tokens(attention="auto", layers=2):
    """Waits and launches of five tokens more."""
    counts = []
    for new_tokens in (3, 8):
        with Card() as card:
            answered(card, new_tokens, layers=layers, attention=attention)
        counts.append((len(card.waits), card.launches))
    return counts[1][0] - counts[0][0], counts[1][1] - counts[0][1]


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_waits_of_a_token(attention):
    waits, _ = of_tokens(attention)
    assert waits <= 5 * WAITS_OF_A_TOKEN


def test_launches_of_a_layer():
    _, of_two = of_tokens(layers=2)
    _, of_four = of_tokens(layers=4)
    assert (of_four - of_two) / 2 / 5 <= LAUNCHES_OF_A_LAYER


def test_rows_that_end_leave_the_others():
    ends = [answered(None, 8)[1][2]]
    expected = answered(None, 8, ends)
    assert len({len(answer) for answer in expected}) > 1
    with Card() as card:
        assert answered(card, 8, ends) == expected
