"""NEFTune's noise: as strong as the paper says for each example, packed or not, and only while training."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_llama

import lowrank
from lowrank.attention import set_attention
from lowrank.training.transforms.neftune import noisy_embeddings

ALPHA = 5.0


def noise_of(model, ids: torch.Tensor) -> torch.Tensor:
    embedding = model.get_input_embeddings()
    return embedding(ids) - torch.nn.functional.embedding(ids, embedding.weight)


@pytest.mark.parametrize("lengths", [[30], [4, 20, 6]])
def test_its_bound_is_that_of_each_example(lengths):
    model = tiny_llama().train()
    set_attention(model, "segments", packing=True)
    ids = torch.randint(3, 300, (1, sum(lengths)))
    found = torch.zeros(1, sum(lengths), 32)
    with noisy_embeddings(model, ALPHA), lowrank.segments(model, lengths):
        for _ in range(200):
            found = torch.maximum(found, noise_of(model, ids).abs())
    for part, length in zip(found[0].split(lengths), lengths, strict=True):
        bound = ALPHA / math.sqrt(length * 32)
        assert part.max() <= bound * (1 + 1e-5)
        assert part.max() > 0.97 * bound
    assert (noise_of(model, ids) == 0).all()


def test_not_while_evaluating_and_from_the_seed():
    model = tiny_llama()
    ids = torch.randint(3, 300, (2, 10))
    with noisy_embeddings(model, ALPHA):
        assert (noise_of(model, ids) == 0).all()
        model.train()
        torch.manual_seed(3)
        first = noise_of(model, ids)
        torch.manual_seed(3)
        assert torch.equal(first, noise_of(model, ids))
        assert first.abs().max() > 0
