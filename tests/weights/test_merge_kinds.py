"""What peft adapts besides plain weights, merged on disk: peft writes, and the merged folder answers as peft's model."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_qwen2
from weight_helpers import IDS, logits, peft_adapter, randomise, reload, save_base

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError
from lowrank.weights import merge_checkpoint


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize(("make", "targets"), [(tiny_gpt2, ["c_attn", "c_fc"]), (tiny_qwen2, ["q_proj", "k_proj"])])
def test_merged_on_disk(make, targets, bias, tmp_path: Path):
    base = save_base(make(), tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_bias=True, bias=bias, target_modules=targets, init_lora_weights=False)
    expected = peft_adapter(base, tmp_path / "adapter", config)
    torch.testing.assert_close(logits(lowrank.load(reload(base), tmp_path / "adapter")), expected, atol=1e-5, rtol=0)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(reload(tmp_path / "merged")(IDS).logits, expected, atol=1e-5, rtol=0)


def test_a_base_without_that_bias_is_not_merged_on_disk(tmp_path: Path):
    base = save_base(tiny_llama(), tmp_path / "base")
    model = lowrank.wrap(reload(base), LoraConfig(r=4, lora_bias=True, target_modules=["q_proj"]))
    randomise(model)
    lowrank.save(model, tmp_path / "adapter")
    with pytest.raises(InputError, match="q_proj cannot be merged: lora_bias trained a bias, and it has none"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
