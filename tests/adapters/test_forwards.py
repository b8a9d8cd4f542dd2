"""A layer is what its forward computes, and a router is known by its place beside the experts."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import lowrank
from lowrank import LoraConfig
from lowrank.adapters.modules import base_modules
from lowrank.adapters.targeting.routers import routers
from lowrank.errors import InputError

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (2, 0)))


class Best(nn.Linear):
    def forward(self, x):
        return super().forward(x).topk(1, dim=-1)


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-10, 10))


class Offset(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids.clamp(max=3) + 1)


class Cast(nn.Linear):
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


@pytest.mark.parametrize(
    "make", [lambda: Causal(3, 3, 3), lambda: Best(3, 3), lambda: Clipped(3, 3), lambda: Offset(5, 3)]
)
def test_a_forward_of_another_kind_takes_no_adapter(make):
    with pytest.raises(InputError, match="its forward is not that of a"):
        lowrank.wrap(nn.Sequential(make()), LoraConfig(target_modules=["0"]))


def test_a_forward_that_only_casts_or_scales_takes_one():
    model = lowrank.wrap(nn.Sequential(Cast(3, 4)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(5, 3)
    adapted = model(x)
    torch.testing.assert_close(lowrank.merge(model)(x), adapted)
    gemma = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, head_dim=8))
    lowrank.wrap(gemma, LoraConfig(target_modules=["embed_tokens"]))


def test_a_weight_that_a_hook_computes_is_refused():
    with pytest.raises(InputError, match="a hook computes its weight"):
        lowrank.wrap(nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3))), LoraConfig(target_modules=["0"]))


def test_routers_are_known_by_their_place():
    hunyuan = transformers.HunYuanMoEV1Config(**SIZES, num_experts=4, moe_topk=2, head_dim=8)
    assert routers(base_modules(transformers.HunYuanMoEV1ForCausalLM(hunyuan))) == {"model.layers.0.mlp.gate.wg"}
    fields = {name: size for name, size in SIZES.items() if name != "num_attention_heads"}
    jetmoe = transformers.JetMoeConfig(**fields, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)
    found = routers(base_modules(transformers.JetMoeForCausalLM(jetmoe)))
    assert found == {"model.layers.0.mlp.router.layer", "model.layers.0.self_attention.experts.router.layer"}
