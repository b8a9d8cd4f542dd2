"""`ensure_weight_tying` against peft: embedding and head adapted, or saved whole, as one; and still tied when merged."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as t
from tiny import tiny_gemma2, tiny_gpt2, tiny_llama
from torch import nn

import lowrank
from lowrank import LoraConfig
from lowrank.adapters import adapter_tensors
from lowrank.errors import InputError
from lowrank.weights import merge_checkpoint

IDS = torch.arange(3, 23)[None]
CASES = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
    "regex": {"target_modules": r".*(q_proj|lm_head)"},
    "whole-embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 300]},
    "same-tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7], "lm_head": [7]}},
}


def tied(make=tiny_llama):
    return make(tie_word_embeddings=True)


def trained(base: nn.Module, **fields: object) -> nn.Module:
    config = LoraConfig(r=3, lora_alpha=4, ensure_weight_tying=True, init_lora_weights=False, **fields)
    model = lowrank.wrap(copy.deepcopy(base), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
@pytest.mark.parametrize("case", CASES)
def test_outputs_files_and_merged_weights_are_pefts(case, make, tmp_path):
    base = tied(make)
    model = trained(base, **CASES[case])
    expected = model(IDS).logits.detach()
    assert (expected - base(IDS).logits).abs().max() > 1e-3
    lowrank.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    back = lowrank.load(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(back(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert adapter_tensors(back, "default").keys() == adapter_tensors(model, "default").keys()

    base.save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "theirs", tmp_path / "on_disk")
    merged = lowrank.merge(model)
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    for folder in ("merged", "on_disk"):
        again = t.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert again.config.tie_word_embeddings
        assert again.lm_head.weight is again.get_input_embeddings().weight
        torch.testing.assert_close(again(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_gradients_are_the_sum_of_both_sides():
    model = trained(tied(), target_modules=["embed_tokens"])
    layer = model.get_input_embeddings().adapters["default"]
    layer.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    with torch.no_grad():
        direction = torch.randn_like(layer.lora_B)
        layer.lora_B += 1e-2 * direction
        up = model(IDS, labels=IDS).loss
        layer.lora_B -= 2e-2 * direction
        down = model(IDS, labels=IDS).loss
    torch.testing.assert_close((layer.lora_B.grad * direction).sum(), (up - down) / 2e-2, rtol=2e-2, atol=1e-4)


def test_on_an_encoder_decoder(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    base = t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=0)).eval()
    config = LoraConfig(r=2, ensure_weight_tying=True, target_modules=["embed_tokens"], init_lora_weights=False)
    model = lowrank.wrap(copy.deepcopy(base), config)
    ids = torch.arange(1, 13).view(2, 6)
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    assert len(lowrank.describe(model)["default"].modules) == 4
    lowrank.save(model, tmp_path / "a")
    back = lowrank.load(copy.deepcopy(base), tmp_path / "a")
    torch.testing.assert_close(back(input_ids=ids, decoder_input_ids=ids).logits, expected)
    merged = lowrank.merge(model)
    torch.testing.assert_close(merged(input_ids=ids, decoder_input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert merged.lm_head.weight is merged.shared.weight is merged.encoder.embed_tokens.weight


def test_what_cannot_stay_tied_is_refused():
    refused = [
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "cannot share dora"),
        ({"target_modules": ["lm_head"], "init_lora_weights": "pissa"}, "cannot share pissa"),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
            "their tokens differ",
        ),
    ]
    for fields, message in refused:
        with pytest.raises(InputError, match=message):
            lowrank.wrap(tied(), LoraConfig(r=2, ensure_weight_tying=True, **fields))
    with pytest.warns(UserWarning, match="nothing is tied"):
        lowrank.wrap(tiny_llama(), LoraConfig(r=2, ensure_weight_tying=True, target_modules=["lm_head"]))


def test_two_adapters_of_which_one_is_tied():
    base = tied(tiny_gpt2)
    fields = {"r": 2, "init_lora_weights": False}
    model = lowrank.wrap(base, LoraConfig(target_modules=["wte"], ensure_weight_tying=True, **fields))
    lowrank.wrap(model, LoraConfig(target_modules=["lm_head"], **fields), "alone")
    lowrank.set_active(model, ["default", "alone"])
    expected = model(IDS).logits
    merged = lowrank.merge(model)
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert not merged.config.tie_word_embeddings
