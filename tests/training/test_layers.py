"""Compiled layers train as others do."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama
from torch import nn

import lowrank
from lowrank.attention import set_attention
from lowrank.errors import InputError
from lowrank.training.transforms.layers import compile_layers, layers_of


def gradients(compiled: bool, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = lowrank.wrap(
        tiny_llama(num_hidden_layers=1), lowrank.LoraConfig(r=4, init_lora_weights="gaussian", **options)
    ).train()
    set_attention(model, "segments", packing=True)
    if compiled:
        compile_layers(model)
    for lengths in ([5, 9], [11, 3, 4]):
        ids = torch.arange(3, 3 + sum(lengths))[None]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        with lowrank.segments(model, lengths):
            model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_the_same_gradients(options):
    expected, found = gradients(False, **options), gradients(True, **options)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_a_model_that_does_not_name_its_layers():
    class Bare(nn.Module):
        _no_split_modules = None

    with pytest.raises(InputError, match="does not say what its layers are"):
        layers_of(Bare(), "training.fsdp")
