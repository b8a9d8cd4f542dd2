"""What a card holds beside tensors is part of what a run is said to take. The card's own figures stand in for a card."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lowrank.recipes.check import _needs
from lowrank.training import estimate
from lowrank.training.estimate import MemoryEstimate, measured_memory
from lowrank.training.machine.card_memory import CONTEXT, beside_tensors

MIB = 2**20
CARD = torch.device("cuda")
CONTEXT_NAME, HOLES, NCCL = "the CUDA context", "holes between the allocator's blocks", "NCCL's buffers"


@pytest.fixture
def card(monkeypatch):
    """A card of 24,000 MiB of which 10,500 are used: 10,000 in the allocator's blocks, of which 9,200 in tensors."""
    figures = {
        "is_initialized": True,
        "mem_get_info": (13_500 * MIB, 24_000 * MIB),
        "memory_reserved": 10_000 * MIB,
        "max_memory_reserved": 10_000 * MIB,
        "max_memory_allocated": 9_200 * MIB,
    }

    def put(**changed: object) -> None:
        for name, value in {**figures, **changed}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)

    put()
    for name in ("NCCL_BUFFSIZE", "NCCL_MAX_NCHANNELS"):
        monkeypatch.delenv(name, raising=False)
    return put


def test_the_parts_are_what_the_card_says(card):
    assert beside_tensors(CARD, 1) == {CONTEXT_NAME: 500 * MIB, HOLES: 800 * MIB}


def test_others_on_the_card_are_not_this_runs_context(card):
    card(mem_get_info=(3_500 * MIB, 24_000 * MIB))
    assert beside_tensors(CARD, 1)[CONTEXT_NAME] == CONTEXT
    card(is_initialized=False)
    assert beside_tensors(CARD, 1)[CONTEXT_NAME] == CONTEXT


def test_several_processes_send_from_buffers(card, monkeypatch):
    assert beside_tensors(CARD, 2)[NCCL] == 2 * 32 * 4 * MIB
    monkeypatch.setenv("NCCL_BUFFSIZE", str(MIB))
    monkeypatch.setenv("NCCL_MAX_NCHANNELS", "8")
    assert beside_tensors(CARD, 2)[NCCL] == 2 * 8 * MIB


def test_a_cpu_has_none():
    assert beside_tensors(torch.device("cpu"), 2) == {}


def test_they_are_part_of_the_estimate_and_told_by_name(card, monkeypatch):
    """A run over one trained value on a card: all that it takes is the peak of its tensors and the rest."""
    value = torch.nn.Parameter(torch.zeros(4 * MIB))
    seen = SimpleNamespace(device=CARD, numel=value.numel, element_size=value.element_size)
    monkeypatch.setattr(estimate, "parts_of", lambda tensor: [tensor])
    run = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[{"params": [seen]}], state={}),
        model=SimpleNamespace(parameters=lambda: [value]),
    )
    found = measured_memory(run, 70 * MIB, 2)
    assert found.total == (9_200 + 500 + 800 + 256) * MIB
    assert found.program == 0
    assert found.rest == found.total - found.weights - found.training - sum(found.beside.values())
    told = _needs(found, MIB, MIB)["memory"]
    assert f"about {9_200 + 500 + 800 + 256:,} MiB at the peak" in told
    assert f"{CONTEXT_NAME} 500, {HOLES} 800, {NCCL} 256" in told


def test_on_a_cpu_nothing_is_told_of_them():
    told = _needs(MemoryEstimate(100 * MIB, 10 * MIB, 20 * MIB, 30 * MIB), MIB, MIB)["memory"]
    assert CONTEXT_NAME not in told
    assert "activations and all else 40)" in told
