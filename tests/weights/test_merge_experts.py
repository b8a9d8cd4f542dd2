"""Mixture-of-experts models: one matrix per expert in the files, one parameter for all in the model."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import VOCAB, build
from weight_helpers import logits, peft_adapter, randomise, reload, save_base, tiny_qwen3_moe

import lowrank
from lowrank import LoraConfig
from lowrank.weights import merge_checkpoint
from lowrank.weights.merging import blocks
from lowrank.weights.merging import shard_writer as stream

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def tiny_mixtral():
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return build(transformers.MixtralConfig(**sizes, **heads))


def tiny_gpt_oss():
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return build(transformers.GptOssConfig(**sizes, **heads, sliding_window=16))


MODELS = {"qwen3_moe": tiny_qwen3_moe, "mixtral": tiny_mixtral, "gpt_oss": tiny_gpt_oss}


@pytest.mark.parametrize("name", MODELS)
def test_fused_experts(name: str, tmp_path: Path) -> None:
    base = save_base(MODELS[name](), tmp_path / "base")
    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=FUSED, init_lora_weights=False)
    model = lowrank.wrap(reload(base), config)
    randomise(model)
    lowrank.save(model, tmp_path / "adapter")
    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    per_expert = name != "gpt_oss"
    assert any(".experts.0." in key for key in before) == per_expert
    assert report.changed == 2 * (1 + (3 * 4 if per_expert else 2))
    assert not torch.allclose(logits(reload(base)), logits(model), atol=1e-2)
    torch.testing.assert_close(logits(reload(tmp_path / "merged")), logits(model), atol=2e-5, rtol=0)


def test_what_peft_saved(tmp_path: Path) -> None:
    base = save_base(tiny_qwen3_moe(), tmp_path / "base")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], target_parameters=FUSED, init_lora_weights=False
    )
    wanted = peft_adapter(base, tmp_path / "adapter", config)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(reload(tmp_path / "merged")), wanted, atol=2e-5, rtol=0)
    model = lowrank.load(reload(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(model), wanted, atol=2e-5, rtol=0)


def test_an_adapter_on_single_experts(tmp_path: Path) -> None:
    """As transformers 4, where every expert was a module of its own, let peft write them."""
    base = save_base(tiny_qwen3_moe(), tmp_path / "base")
    before = load_file(base / "model.safetensors")
    names = [key.removesuffix(".weight") for key in before if ".experts." in key]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in names:
        out, into = before[f"{name}.weight"].shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, into, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge_checkpoint(base, adapter, tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    for name in names:
        A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 3 * B @ A)


@pytest.mark.parametrize("name", MODELS)
def test_a_block_is_never_a_whole_expert(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt_oss' files hold all experts in one tensor: blocks are rows of one expert or of two, in a few threads."""
    base = save_base(MODELS[name](), tmp_path / "base")
    model = lowrank.wrap(reload(base), LoraConfig(r=3, target_parameters=FUSED, init_lora_weights=False))
    randomise(model)
    lowrank.save(model, tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "whole")
    sizes: list[int] = []
    threads: set[int] = set()

    def spied(block: blocks.Block, *rest: object) -> object:
        sizes.append(block.size)
        threads.add(threading.get_ident())
        return merge_block(block, *rest)

    merge_block = blocks.merge_block
    monkeypatch.setattr(stream, "merge_block", spied)
    monkeypatch.setattr(blocks, "BLOCK", 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "blocks", dtype="float32")
    assert max(sizes) <= 4 * 100
    assert 0 < len(threads) <= 8
    assert report.rounding_loss < 1e-5
    whole, parts = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "blocks"))
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key], tensor)
