"""Tiny mixture-of-experts models whose experts matter, for the tests of adapters on them."""

from __future__ import annotations

import torch
import transformers
from tiny import _LLAMA_LIKE, VOCAB, build

from lowrank import LoraConfig

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))

_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_MOE = {**_LLAMA_LIKE, **_EXPERTS, "head_dim": 8}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_DEEPSEEK = {**_LATENT, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}

ARCHITECTURES = {
    "qwen3_moe": {**_MOE, "num_experts": 4},
    "qwen2_moe": {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 24},
    "mixtral": {**_MOE, "num_local_experts": 4},
    "olmoe": {**_MOE, "num_experts": 4},
    "gpt_oss": {**_MOE, "num_local_experts": 4, "sliding_window": 8},
    "llama4_text": {**_MOE, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
    "deepseek_v3": {**_LLAMA_LIKE, **_EXPERTS, **_DEEPSEEK, "n_routed_experts": 4},
    "jetmoe": {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
}
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def model_of(name: str, **overrides: object):
    config = transformers.AutoConfig.for_model(name, **{**ARCHITECTURES[name], **overrides})
    model = build(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stacks(model).values():
            parameter.normal_(0, 0.15, generator=generator)
    return model


def stacks(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 3}


def all_stacks(model) -> list[str]:
    return sorted({".".join(name.split(".")[-2:]) for name in stacks(model)})


def logits(model) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def config_of(targets: list[str], **fields: object) -> LoraConfig:
    return LoraConfig(**{"r": 3, "target_modules": [], "target_parameters": targets, **fields})
