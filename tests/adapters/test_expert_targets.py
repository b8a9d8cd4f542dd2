"""What `target_parameters` refuses: patterns, fields and combinations that would not do what they say."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from expert_models import TARGETS, config_of, logits, model_of

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError

REFUSED = {
    "no such parameter": ({"target_parameters": ["experts.gate_proj"]}, "this model's experts are experts.down_proj, "),
    "as modules": ({"target_modules": ["gate_proj"]}, "name those in target_parameters"),
    "dora": ({"use_dora": True}, "use_dora"),
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout: 0.1 does not go with target_parameters"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
    "of a module that is adapted": (
        {"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]},
        "q_proj is asked for twice",
    ),
    "other layers": ({"layers_to_transform": [0]}, "target_parameters matches model.layers.1.mlp.experts"),
    "excluded": ({"exclude_modules": ["experts"]}, "exclude_modules"),
    "saved whole": ({"modules_to_save": ["mlp"]}, "modules_to_save"),
    "one dimension": ({"target_parameters": ["input_layernorm.weight"]}, r"is \(32,\) of torch.float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_is_refused_by_name_and_leaves_the_model_alone(case: str):
    fields, message = REFUSED[case]
    model = model_of("qwen3_moe")
    with pytest.raises(InputError, match=message):
        lowrank.wrap(model, LoraConfig(**{"target_modules": [], "target_parameters": TARGETS, **fields}))
    assert lowrank.describe(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_experts_of_which_only_some_are_in_four_bits_are_refused():
    model = model_of("qwen3_moe")
    replace_parameter_4bit(model.model.layers[1].mlp.experts, "down_proj")
    with pytest.raises(InputError, match="keeps only some of gate_up_proj, down_proj quantised"):
        lowrank.wrap(model, config_of(TARGETS))


def test_experts_biases_are_refused():
    with pytest.raises(InputError, match=r"bias: all would train the biases of model.layers.0.mlp.experts"):
        lowrank.wrap(model_of("gpt_oss"), config_of(TARGETS, bias="all"))


def test_an_adapter_on_experts_cannot_be_routed_and_stands_beside_one_that_is():
    model = lowrank.wrap(model_of("qwen3_moe"), config_of(TARGETS))
    lowrank.wrap(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "linear")
    with (
        pytest.raises(InputError, match="'default' cannot be routed: it adapts model"),
        lowrank.routed(model, ["default", "linear"]),
    ):
        pass
    expected = logits(model)
    with lowrank.routed(model, ["linear", "linear"]):
        torch.testing.assert_close(logits(model), expected)


def test_a_module_saved_whole_by_one_adapter_and_adapted_by_another_cannot_act_at_once():
    model = lowrank.wrap(model_of("qwen3_moe"), config_of(TARGETS))
    lowrank.wrap(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"]), "whole")
    logits(model)
    with pytest.raises(InputError, match=r"'default' changes .*experts, and 'whole' trains a copy of the whole of it"):
        lowrank.set_active(model, ["default", "whole"])
