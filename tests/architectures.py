"""Tiny models of many architectures, each with inputs that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from tiny import VOCAB, tiny_gemma2, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2

IDS = torch.arange(3, 15).view(2, 6)
LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EIGHT = {**LLAMA_LIKE, "head_dim": 8}


def causal(config: t.PretrainedConfig) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        return t.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return make


def other(config: t.PretrainedConfig) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        return t.AutoModel.from_config(config, dtype=torch.float32).eval()

    return make


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "mistral": tiny_mistral,
    "qwen2": tiny_qwen2,
    "gemma2": tiny_gemma2,
    "gpt2": tiny_gpt2,
    "qwen3": causal(t.Qwen3Config(**EIGHT)),
    "gemma3": causal(t.Gemma3TextConfig(**EIGHT)),
    "phi3": causal(t.Phi3Config(**LLAMA_LIKE)),
    "granite": causal(t.GraniteConfig(**LLAMA_LIKE)),
    "olmo2": causal(t.Olmo2Config(**LLAMA_LIKE)),
    "gpt_neox": causal(
        t.GPTNeoXConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    ),
    "opt": causal(
        t.OPTConfig(
            vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0, pad_token_id=0,
        )
    ),
    "bloom": causal(t.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
    "falcon": causal(t.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
    "qwen3_moe": causal(t.Qwen3MoeConfig(**EIGHT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)),
    "bert": other(
        t.BertConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    ),
    "t5": other(
        t.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    ),
    "vit": other(
        t.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
        )
    ),
}  # fmt: skip


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Keyword arguments of the model's forward."""
    if name == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}
    return {"input_ids": IDS, "decoder_input_ids": IDS} if name == "t5" else {"input_ids": IDS}


def output(model: Any, name: str) -> torch.Tensor:
    """Its logits, or its last hidden states."""
    out = model(**inputs(name))
    return out.logits if hasattr(out, "logits") else out.last_hidden_state
