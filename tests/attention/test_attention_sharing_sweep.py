"""Every causal architecture of transformers that has a tiny model: forests are exact, or refused by the self-test."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
import zoo
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lowrank.attention import check_sharing, positions_of, segments, set_attention
from lowrank.errors import InputError

SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "rotary_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "d_kv"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 256),
    **dict.fromkeys(("moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "sliding_window"), 16),
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "is_decoder": True,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "initializer_range": 0.1,
}
# Some say their head's size or the number of their key heads by other means.
WITHOUT: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim",),
    ("num_key_value_heads",),
    ("head_dim", "num_key_value_heads"),
)
MOST = 30e6  # parameters of a model that is still a small one
SURE = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "phi3",
}


def _build(name: str) -> transformers.PreTrainedModel:
    kind = CONFIG_MAPPING[name]
    known = set(inspect.signature(kind.__init__).parameters)
    known = known.union(*(vars(base).get("__annotations__", {}) for base in kind.__mro__))
    errors = []
    for left_out in WITHOUT:
        try:
            config = kind(**{k: v for k, v in SMALL.items() if k in known and k not in left_out})
            with torch.device("meta"):
                size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
            if size > MOST:
                pytest.skip(f"{size / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            model(input_ids=torch.arange(3, 9)[None], use_cache=False)
        except Exception as error:  # each config refuses in its own way what it does not take
            errors.append(f"{type(error).__name__}: {error}")
        else:
            return model
    pytest.skip(f"no tiny model of it: {errors[-1]}")


def _error(model: transformers.PreTrainedModel) -> float:
    """The largest difference of a path's logits from those of the example alone, as a share of their size."""
    parts = zoo.examples(zoo.TREE)
    parts = [3 + part % 100 for part in parts]
    positions = torch.tensor([positions_of(zoo.TREE, zoo.PARENTS)])
    errors = []
    with torch.no_grad():
        with segments(model, zoo.TREE, zoo.PARENTS):
            logits = model(input_ids=torch.cat(parts, dim=1), position_ids=positions, use_cache=False).logits
        for path in zoo.paths(zoo.PARENTS):
            found = torch.cat([logits.split(zoo.TREE, dim=1)[number] for number in path], dim=1)
            alone = model(input_ids=torch.cat([parts[number] for number in path], dim=1), use_cache=False).logits
            errors.append(float((found - alone).norm() / alone.norm()))
    return max(errors)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["own", "segments"])
@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_forests_are_exact_or_refused(name, backend):
    model = _build(name)
    try:
        if backend == "segments":
            set_attention(model, "segments")
        check_sharing(model)
    except InputError:
        assert name not in SURE
    else:
        assert _error(model) < 1e-5
