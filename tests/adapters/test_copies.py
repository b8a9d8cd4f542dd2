"""What is trained whole: modules (`modules_to_save`) and biases (`bias: all`), beside adapters and inside each other."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny import tiny_llama
from torch import nn

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError
from lowrank.models import load_model

IDS = torch.arange(3, 23)[None]


def classifier() -> transformers.PreTrainedModel:
    """A head of two layers with biases, as Roberta has it."""
    config = transformers.RobertaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(config).eval()


def test_all_biases_beside_a_head_that_is_trained_whole(tmp_path):
    model = lowrank.wrap(classifier(), LoraConfig(r=2, bias="all", modules_to_save=["classifier"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = model.eval()(IDS).logits
    lowrank.save(model, tmp_path)
    torch.testing.assert_close(lowrank.load(classifier(), tmp_path).eval()(IDS).logits, expected)
    torch.testing.assert_close(lowrank.merge(model)(IDS).logits, expected)


def test_a_copys_statistics_are_saved_and_merged_too(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = lowrank.wrap(copy.deepcopy(base), LoraConfig(r=2, modules_to_save=["1"])).train()
    model(5 * torch.randn(9, 4) + 3)
    x = torch.randn(9, 4)
    expected = model.eval()(x)
    assert not torch.allclose(expected, base.eval()(x))
    lowrank.save(model, tmp_path)
    torch.testing.assert_close(lowrank.load(copy.deepcopy(base), tmp_path).eval()(x), expected)
    torch.testing.assert_close(lowrank.merge(model)(x), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules_to_save": ["mlp", "up_proj"]}, "layers.0.mlp.up_proj and model.layers.0.mlp, which holds it"),
        ({"modules_to_save": ["model"], "trainable_token_indices": [3]}, "no module is left"),
        (
            {"target_modules": ["lm_head"], "modules_to_save": ["model"], "trainable_token_indices": [3]},
            r"embed_tokens is in model, which modules_to_save trains whole",
        ),
    ],
)
def test_one_inside_of_another_is_refused(fields, message):
    model = tiny_llama()
    with pytest.raises(InputError, match=message):
        lowrank.wrap(model, LoraConfig(**{"target_modules": ["q_proj"], **fields}))
    assert lowrank.describe(model) == {}


@pytest.mark.parametrize(
    "quantization",
    [{"load_in_4bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, {"load_in_8bit": True}],
)
@pytest.mark.parametrize("name", ["up_proj", "mlp"])
def test_a_quantised_module_cannot_be_trained_whole(quantization, name, tmp_path):
    tiny_llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="bfloat16", quantization=quantization)
    with pytest.raises(
        InputError, match=f"modules_to_save: model.layers.0.mlp.*{name}.* is quantised|mlp is quantised"
    ):
        lowrank.wrap(model, LoraConfig(target_modules=["q_proj"], modules_to_save=[name]))
    lowrank.wrap(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def test_an_adapter_inside_of_what_another_holds_whole_cannot_act_with_it():
    model = lowrank.wrap(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"]), adapter="a")
    lowrank.wrap(model, LoraConfig(r=2, target_modules=["up_proj"]), adapter="b")
    with pytest.raises(InputError, match=r"'a' holds model\.layers\.0\.mlp whole, and 'b' adapts .*up_proj inside"):
        lowrank.set_active(model, ["a", "b"])
    with lowrank.using(model, "b"):
        model(IDS)
