"""Weights that are read past their module: an adapter there would train nothing, so it is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import MODELS

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError

IDS = torch.arange(3, 15).view(2, 6)


def tiny_mamba() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_config(
        transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    )


def test_mambas_projections_that_its_kernels_read():
    for name in ("dt_proj", "x_proj", "out_proj"):
        with pytest.raises(InputError, match=f"{name} would act on nothing: MambaMixer reads its weight"):
            lowrank.wrap(tiny_mamba(), LoraConfig(target_modules=[name]))
    model = lowrank.wrap(tiny_mamba(), LoraConfig(r=2))
    assert lowrank.describe(model)["default"].modules == ("backbone.layers.0.mixer.in_proj",)
    model(IDS).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_table_that_lends_its_weight_to_both_sides():
    with pytest.raises(InputError, match=r"shared would act on nothing: encoder\.embed_tokens reads its weight"):
        lowrank.wrap(MODELS["t5"](), LoraConfig(target_modules=["shared"]))
    model = lowrank.wrap(MODELS["t5"](), LoraConfig(target_modules=["embed_tokens"]))
    assert len(lowrank.describe(model)["default"].modules) == 2
