"""A training step on a card: what it gives is the CPU's, and what it asks of the host is counted.

The card is a pretended one, so this holds on every machine; it knows devices, waits and launches, not CUDA's numerics.
"""

from __future__ import annotations

import pytest
import torch
from architectures import MODELS
from card_steps import trained
from pretended import Card
from tiny import tiny_llama

from lowrank.adapters import AdaLoraConfig, LoraConfig

ALL = {"target_modules": "all-linear"}
LORA = LoraConfig(r=4, lora_alpha=8, **ALL)
METHODS = {
    "lora": LORA,
    "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True, **ALL),
    "dropout": LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, **ALL),
    "pissa": LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", **ALL),
    "adalora": AdaLoraConfig(init_r=6, target_r=3, tinit=1, total_step=9, **ALL),
}

# Of a step of one pack through two layers, counted, and a twentieth more.
LAUNCHES = {"lora": 457, "dora": 835, "dropout": 605, "pissa": 516, "adalora": 680, "experts": 570}
LAUNCHES_OF_A_LAYER = 194
# Of two layers of experts and their adapters, forward and backward.
GROUPED = 32
# The step's loss and norm are read.
WAITS = 1


def both(config=LORA, dtype=torch.bfloat16, **how):
    on_card = trained(tiny_llama().to(dtype), config, Card(), **how)
    return on_card, trained(tiny_llama().to(dtype), config, None, **how)


def same(card, cpu, tolerance=5e-2):
    assert card.attention == cpu.attention == "segments"
    assert card.losses == pytest.approx(cpu.losses, rel=3e-2)
    assert card.apart(cpu) < tolerance


@pytest.mark.parametrize("method", METHODS)
def test_packs(method):
    card, cpu = both(METHODS[method])
    same(card, cpu)
    assert any("_varlen_attn_backward" in name for name in card.operations)
    assert card.launches <= LAUNCHES[method]
    assert len(card.waits) <= WAITS, card.waits
    assert not card.pageable


def test_launches_of_a_layer():
    two, four = (trained(tiny_llama(num_hidden_layers=n).to(torch.bfloat16), LORA, Card()).launches for n in (2, 4))
    assert (four - two) / 2 <= LAUNCHES_OF_A_LAYER


def test_float16_waits_once_more():
    card, cpu = both(dtype=torch.float16)
    same(card, cpu)
    assert len(card.waits) <= WAITS + 1, card.waits


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_experts(capability):
    """Only from 9.0 on has bfloat16 a kernel for grouped products; before, the host reads the groups' ends for each."""
    experts = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], target_parameters=["gate_up_proj", "down_proj"]
    )
    card = trained(MODELS["qwen3_moe"]().to(torch.bfloat16), experts, Card(capability))
    same(card, trained(MODELS["qwen3_moe"]().to(torch.bfloat16), experts, None))
    grouped = sum(count for name, count in card.operations.items() if "_grouped_mm" in name)
    assert 0 < grouped <= GROUPED
    assert card.launches <= LAUNCHES["experts"]
    assert len(card.waits) <= WAITS + (grouped if capability < (9, 0) else 0), card.waits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padded_rows(dtype):
    card, cpu = both(dtype=dtype, packing=False)
    same(card, cpu)
    assert len(card.waits) <= WAITS + (dtype == torch.float16), card.waits


@pytest.mark.parametrize(("name", "packing"), [("gemma2", True), ("gemma2", False), ("mistral", False), ("gpt2", True)])
def test_windows_caps_and_warnings(name, packing):
    """Of gemma2's two kinds of masks neither is asked about, and strips take their indices without a wait; nobody looks
    whether a token of GPT-2's pack is padding."""
    card = trained(MODELS[name]().to(torch.bfloat16), LORA, Card(), packing=packing)
    same(card, trained(MODELS[name]().to(torch.bfloat16), LORA, None, packing=packing))
    assert len(card.waits) <= WAITS, card.waits
    assert not card.pageable


def test_every_weight_under_autocast():
    same(*both(dtype=torch.float32, full=True))


@pytest.mark.parametrize("mode", [True, "selective"])
def test_recomputed(mode):
    same(*both(recompute=mode))


def test_selective_recomputation_runs_no_attention_twice():
    card, _ = both(recompute="selective")
    forward = next(count for name, count in card.operations.items() if "_varlen_attn." in name)
    backward = next(count for name, count in card.operations.items() if "_varlen_attn_backward" in name)
    assert forward == backward
