"""A training step on a card: what it gives is the CPU's, and what it asks of the host is counted.

The card is a pretended one, so this holds on every machine; it knows devices, waits and launches, not CUDA's numerics.
"""

from __future__ import annotations

import pytest
import torch
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
LAUNCHES = {"lora": 485, "dora": 864, "dropout": 634, "pissa": 544, "adalora": 709}
# Two: transformers looks whether a row is a pack, and the step's loss and norm are read.
WAITS = 2


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padded_rows(dtype):
    card, cpu = both(dtype=dtype, packing=False)
    same(card, cpu)
    assert len(card.waits) <= 8 + (dtype == torch.float16), card.waits


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
