"""Tied embeddings: right in training, saving, loading and merging."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import tiny_gemma2, tiny_llama

import lowrank
from lowrank import LoraConfig

IDS = torch.arange(3, 23)[None]
CONFIGS = {
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False),
    "head": LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False),
    "both": LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False),
    "whole-head": LoraConfig(r=4, modules_to_save=["lm_head"], init_lora_weights=False),
    "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[7, 300], init_lora_weights=False),
}


def tied(make):
    return make(tie_word_embeddings=True)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_trained_saved_loaded_merged(make, config, tmp_path):
    model = lowrank.wrap(tied(make), config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    expected = model(IDS).logits.detach()
    assert not torch.allclose(expected, tied(make)(IDS).logits, atol=1e-4)

    lowrank.save(model, tmp_path / "adapter")
    loaded = lowrank.load(tied(make), tmp_path / "adapter")
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-5, rtol=1e-5)

    merged = lowrank.merge(model)
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(IDS).logits, merged(IDS).logits, atol=1e-5, rtol=1e-5)
    still_tied = again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()
    assert again.config.tie_word_embeddings == still_tied
