"""Model and adapter folders for the tests of lowrank.weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model
from tiny import VOCAB, build, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

IDS = torch.tensor([[3, 40, 77, 5, 123, 9, 250, 31, 8, 64], [7, 7, 99, 200, 14, 3, 61, 180, 2, 55]])


def tiny_qwen3_moe(**overrides: object) -> PreTrainedModel:
    return build(
        transformers.Qwen3MoeConfig(
            **{
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "intermediate_size": 48,
                "moe_intermediate_size": 16,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "max_position_embeddings": 128,
                **overrides,
            }
        )
    )


def save_base(model: PreTrainedModel, folder: Path, **kwargs: object) -> Path:
    model.save_pretrained(folder, **kwargs)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def reload(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def randomise(model: torch.nn.Module, scale: float = 0.2) -> None:
    """Gives every trainable parameter an effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data += noise.to(parameter.dtype)


def peft_adapter(base: Path, folder: Path, config: object) -> torch.Tensor:
    """Makes an adapter with peft, saves it, and returns the adapted model's logits."""
    model = get_peft_model(reload(base), config)
    randomise(model)
    model.eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def with_peft(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(reload(base), adapter))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
