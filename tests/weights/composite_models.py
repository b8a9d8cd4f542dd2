"""Tiny whole models (vision or sound beside language), of the families whose text half can be taken out alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from transformers import PreTrainedModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}


def llama4() -> PreTrainedModel:
    vision = VISION | {"image_size": 16, "patch_size": 8, "intermediate_size": 128, "vision_output_dim": 32}
    vision |= {"projector_input_dim": 32, "projector_output_dim": 32}
    text = SIZES | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
    return hf.Llama4ForConditionalGeneration(hf.Llama4Config(text_config=text, vision_config=vision))


def mllama() -> PreTrainedModel:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 4,
        "vision_output_dim": 64,
        "image_size": 16,
        "patch_size": 8,
        "max_num_tiles": 1,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }
    text = SIZES | {"cross_attention_layers": [1]}
    return hf.MllamaForConditionalGeneration(hf.MllamaConfig(text_config=text, vision_config=vision))


def qwen3_5() -> PreTrainedModel:
    config = hf.Qwen3_5Config(text_config=SIZES | DELTA, vision_config=dict(QWEN_VISION))
    return hf.Qwen3_5ForConditionalGeneration(config)


def qwen3_5_moe() -> PreTrainedModel:
    config = hf.Qwen3_5MoeConfig(text_config=SIZES | DELTA | EXPERTS, vision_config=dict(QWEN_VISION))
    return hf.Qwen3_5MoeForConditionalGeneration(config)


def emu3() -> PreTrainedModel:
    vision = {
        "codebook_size": 16,
        "embed_dim": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [1],
        "hidden_size": 32,
        "num_attention_heads": 1,
    }
    vocabulary = {"<image>": 90} | {f"<|visual token {i:06}|>": 40 + i for i in range(16)}
    config = hf.Emu3Config(vq_config=vision, text_config=dict(SIZES), vocabulary_map=vocabulary)
    return hf.Emu3ForConditionalGeneration(config)


def gemma3() -> PreTrainedModel:
    text = SIZES | {"head_dim": 8, "layer_types": ["full_attention"] * 2}
    vision = VISION | {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8}
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return hf.Gemma3ForConditionalGeneration(config)


def llava() -> PreTrainedModel:
    vision = VISION | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 32}
    config = hf.LlavaConfig(text_config=SIZES | {"model_type": "llama"}, vision_config=vision, image_token_index=90)
    return hf.LlavaForConditionalGeneration(config)


def mistral3() -> PreTrainedModel:
    vision = VISION | {"model_type": "pixtral", "image_size": 16, "patch_size": 8, "head_dim": 8}
    text = SIZES | {"model_type": "mistral", "head_dim": 8}
    config = hf.Mistral3Config(text_config=text, vision_config=vision, image_token_index=90)
    return hf.Mistral3ForConditionalGeneration(config)


def qwen2_5_vl() -> PreTrainedModel:
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
    vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [0]}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = hf.Qwen2_5_VLConfig(text_config=SIZES | {"rope_parameters": rope}, vision_config=vision)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


# Those of which AutoModelForCausalLM takes the text half, and those of which it takes the whole.
TAKEN_OUT: dict[str, Callable[[], PreTrainedModel]] = {
    "llama4": llama4,
    "mllama": mllama,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
}
WHOLE: dict[str, Callable[[], PreTrainedModel]] = {
    "emu3": emu3,
    "gemma3": gemma3,
    "llava": llava,
    "mistral3": mistral3,
    "qwen2_5_vl": qwen2_5_vl,
}


def tiny(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return make().eval()
