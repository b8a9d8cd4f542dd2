"""Tiny random models and a tiny tokenizer, built from transformers' own configs: stand-ins that are real."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 320

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A causal language model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tiny_llama(**overrides: object) -> PreTrainedModel:
    return build(transformers.LlamaConfig(**{**_LLAMA_LIKE, **overrides}))


def tiny_mistral(**overrides: object) -> PreTrainedModel:
    return build(transformers.MistralConfig(**{**_LLAMA_LIKE, "sliding_window": 16, **overrides}))


def tiny_qwen2(**overrides: object) -> PreTrainedModel:
    return build(transformers.Qwen2Config(**{**_LLAMA_LIKE, **overrides}))


def tiny_gemma2(**overrides: object) -> PreTrainedModel:
    return build(transformers.Gemma2Config(**{**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 16, **overrides}))


def tiny_gpt2(**overrides: object) -> PreTrainedModel:
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return build(transformers.GPT2Config(**{**sizes, **ids, **no_dropout, **overrides}))


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 256 bytes and a few special tokens (ids below `VOCAB`), with a ChatML template."""
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = chat_template
    return tokenizer
