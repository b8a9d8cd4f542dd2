"""QLoRA: adapters over quantised bases, through the sequence that corrupts them elsewhere (eval, train, merge)."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import tiny_llama

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.adapters.kinds.known import kind_of
from lowrank.errors import InputError
from lowrank.models import load_model
from lowrank.quantisers.registry import quantiser_of

IDS = torch.arange(3, 23)[None]

BASES = {
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4-stored-as-bf16": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
    "torchao-int8": {"quant_method": "torchao", "bits": 8},
}
METHODS = {
    "lora": LoraConfig(r=4, init_lora_weights=False),
    "dora": LoraConfig(r=4, init_lora_weights=False, use_dora=True),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, init_lora_weights=False, lora_alpha=0.05),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(path)
    return path


def gradients(model):
    model.train()
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    model.eval()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def dense_twin(model, folder):
    """A dense model with the weights that the quantised one stands for."""
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for path, module in model.named_modules():
        if quantiser_of(module) is not None:
            twin.get_submodule(path).weight.data.copy_(kind_of(module).weight(module))
    return twin.eval()


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_evaluate_train_merge(folder, base, config):
    model = load_model(str(folder), dtype="bfloat16", quantization=base)
    twin = dense_twin(model, folder)
    for wrapped in (model, twin):
        torch.manual_seed(0)
        lowrank.wrap(wrapped, config)
    before = gradients(model)
    with torch.no_grad():
        logits = model(IDS).logits.float()
    torch.testing.assert_close(gradients(model), before)  # an evaluation has spoiled nothing
    expected = gradients(twin)
    assert torch.nn.functional.cosine_similarity(before, expected, dim=0) > 0.99
    assert 0.9 < before.norm() / expected.norm() < 1.1
    merged = lowrank.merge(model)
    assert not any(quantiser_of(module) for module in merged.modules())
    with torch.no_grad():
        difference = (merged(IDS).logits.float() - logits).norm() / logits.norm()
    assert difference < 0.03  # bf16 rounding, and 8-bit activations


def test_the_merged_model_is_plain_and_loads_without_bitsandbytes(folder, tmp_path):
    model = load_model(str(folder), dtype="bfloat16", quantization=BASES["nf4-double"])
    merged = lowrank.merge(lowrank.wrap(model, METHODS["lora"]))
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert getattr(again.config, "quantization_config", None) is None
    torch.testing.assert_close(again(IDS).logits.float(), merged(IDS).logits.float())


def test_loftq_takes_up_part_of_what_quantisation_lost(folder):
    original = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = load_model(str(folder), dtype="bfloat16", quantization=BASES["nf4-double"])
    lost_before = (original(IDS).logits - model(IDS).logits).float().norm()
    lowrank.wrap(model, LoraConfig(r=32, init_lora_weights="loftq"), originals=lambda name: original.state_dict()[name])
    lost_after = (original(IDS).logits - model(IDS).logits).float().norm()
    assert lost_after < 0.7 * lost_before
    layer = model.model.layers[0].mlp.up_proj
    lost = original.model.layers[0].mlp.up_proj.weight.float() - kind_of(layer).weight(layer).float()
    _, S, _ = torch.linalg.svd(lost)
    term = layer.adapters["default"].term(layer)
    torch.testing.assert_close((lost - term.scale * term.B @ term.A).norm(), S[32:].norm(), atol=1e-5, rtol=1e-4)


def test_loftq_refuses_a_dense_base_and_asks_for_the_originals(folder):
    with pytest.raises(InputError, match="loftq needs `originals`"):
        lowrank.wrap(tiny_llama(), LoraConfig(init_lora_weights="loftq"))
    with pytest.raises(InputError, match="corrects a 4-bit base"):
        lowrank.wrap(tiny_llama(), LoraConfig(init_lora_weights="loftq"), originals=lambda name: torch.zeros(1))
    model = load_model(str(folder), dtype="bfloat16", quantization=BASES["fp4"])
    with pytest.raises(InputError, match="the original weight has the shape"):
        lowrank.wrap(model, LoraConfig(init_lora_weights="loftq"), originals=lambda name: torch.zeros(1))
