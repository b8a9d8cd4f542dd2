"""Scaling a live adapter: forward, merge and file say the same, and LoRA's is what peft makes of it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from tiny import tiny_llama
from torch import nn

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.errors import InputError

IDS = torch.arange(3, 23)[None]
RANDOM = {"init_lora_weights": False}
METHODS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "up_proj"], alpha_pattern={"up_proj": 3}, **RANDOM),
    "rslora": LoraConfig(r=4, use_rslora=True, target_modules=["q_proj"], **RANDOM),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "up_proj"], **RANDOM),
    "pissa": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, lora_alpha=0.1, target_modules=["q_proj"], **RANDOM),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], **RANDOM),
}


def scaled(name: str, factor: float) -> nn.Module:
    torch.manual_seed(0)
    model = lowrank.wrap(tiny_llama(), METHODS[name])
    for key, parameter in model.named_parameters():
        if ".adapters." in key:
            parameter.data += 0.02 * torch.randn_like(parameter)
    lowrank.set_scale(model, "default", factor)
    return model


@pytest.mark.parametrize("name", METHODS)
def test_forward_merge_and_file_agree(name, tmp_path):
    model = scaled(name, 0.3)
    expected = model(IDS).logits
    assert not torch.allclose(expected, scaled(name, 1.0)(IDS).logits, atol=1e-5)
    assert lowrank.describe(model)["default"].scale == 0.3
    torch.testing.assert_close(copy.deepcopy(model)(IDS).logits, expected)
    lowrank.save(model, tmp_path)
    loaded = lowrank.load(tiny_llama(), tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lowrank.merge(model)(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "embedding"])
def test_it_is_what_peft_makes_of_it(name, tmp_path):
    lowrank.save(scaled(name, 1.0), tmp_path)
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    for module in theirs.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.3)
    torch.testing.assert_close(scaled(name, 0.3)(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_block_scales_for_as_long_as_it_lasts_and_leaves_what_replaces_alone():
    model = lowrank.wrap(tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **RANDOM))
    before = model(IDS).logits
    with lowrank.scaled(model, "default", 0.0):
        hidden = tiny_llama().model(IDS).last_hidden_state
        torch.testing.assert_close(model(IDS).logits, model.lm_head(hidden))
        with lowrank.scaled(model, "default", 1.0), lowrank.routed(model, ["default"]):
            torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(IDS).logits, before)


def test_rows_are_scaled_each_by_its_adapters_factor():
    model = scaled("lora", 0.3)
    lowrank.wrap(model, METHODS["embedding"], "other")
    with lowrank.using(model, "default"):
        expected = model(IDS).logits
    with lowrank.routed(model, ["default", "other"]):
        torch.testing.assert_close(model(IDS.repeat(2, 1)).logits[:1], expected, atol=1e-5, rtol=1e-5)


def test_two_that_act_together_are_weighed_apart():
    model = nn.Sequential(nn.Linear(8, 8))
    for name in "ab":
        lowrank.wrap(model, LoraConfig(target_modules=["0"], **RANDOM), name)
    x = torch.randn(3, 8)
    deltas = {}
    with lowrank.disabled(model):
        base = model(x)
    for name in "ab":
        with lowrank.using(model, name):
            deltas[name] = model(x) - base
    lowrank.set_active(model, ["a", "b"])
    lowrank.set_scale(model, "a", 2.0)
    lowrank.set_scale(model, "b", -0.5)
    torch.testing.assert_close(model(x), base + 2 * deltas["a"] - 0.5 * deltas["b"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        lowrank.merge(model)(x), base + 2 * deltas["a"] - 0.5 * deltas["b"], atol=1e-5, rtol=1e-5
    )


def test_what_a_file_cannot_say_and_what_is_no_number_is_refused(tmp_path):
    model = scaled("lora", 0.0)
    torch.testing.assert_close(model(IDS).logits, tiny_llama()(IDS).logits)
    with pytest.raises(InputError, match="scaled by 0, and a file says scales above 0"):
        lowrank.save(model, tmp_path)
    with pytest.raises(InputError, match="cannot be scaled by nan"):
        lowrank.set_scale(model, "default", float("nan"))
    with pytest.raises(InputError, match="no adapter 'x'"):
        lowrank.set_scale(model, "x", 1.0)
