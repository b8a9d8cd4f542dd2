"""A base in few bits on a card: the CPU's own step, the host waits no more often than over a dense base."""

from __future__ import annotations

import pytest
import torch
from card_steps import trained
from pretended import Card
from tiny import tiny_llama

from lowrank.adapters import LoraConfig
from lowrank.models import load_model
from lowrank.quantisers.bitsandbytes import BitsAndBytes

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
# As over a dense base, and what unpacks each of the modules' weights and its blocks' magnitudes, forward and backward.
LAUNCHES = 602


def test_four_bits(tmp_path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)

    def base():
        return load_model(str(tmp_path), quantization=BitsAndBytes.schemes["nf4-double"], device="cpu")

    card, cpu = trained(base(), LORA, Card()), trained(base(), LORA, None)
    assert card.losses == pytest.approx(cpu.losses, rel=3e-2)
    assert card.apart(cpu) < 5e-2
    unpacked = sum(count for name, count in card.operations.items() if "dequantize_4bit" in name)
    assert unpacked >= 2 * 2 * 7 - 3  # two layers of seven modules, forward and backward, but for the first inputs
    assert card.launches <= LAUNCHES
    assert len(card.waits) <= 1, card.waits
    assert not card.pageable
