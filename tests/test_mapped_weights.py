"""On a CPU a base's weights stay on the memory map of its file: processes share them, and the file is never written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama

import lowrank
from lowrank import LoraConfig
from lowrank.models import load_model


@pytest.fixture
def base(tmp_path):
    tiny_llama().bfloat16().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def private_maps(file: Path) -> list[range]:
    """Where this process has the file mapped, so that what it writes there stays its own."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            bounds, flags = line.split()[:2]
            begin, end = bounds.split("-")
            assert flags[3] == "p", line
            found.append(range(int(begin, 16), int(end, 16)))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's table of maps")
def test_frozen_weights_are_the_files_own_pages(base):
    model = load_model(str(base), device="cpu")
    lowrank.wrap(model, LoraConfig(r=4, target_modules="all-linear"))
    maps = private_maps(base / "model.safetensors")
    frozen = {name: p.data_ptr() for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert [name for name, at in frozen.items() if not any(at in each for each in maps)] == []


def test_training_every_weight_in_place_leaves_the_file(base):
    file = base / "model.safetensors"
    before = file.read_bytes()
    model = load_model(str(base), device="cpu").requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    ids = torch.arange(3, 19)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    again = load_model(str(base), device="cpu").state_dict()
    assert not any(torch.equal(p, again[name]) for name, p in model.named_parameters() if p.ndim == 2)
    assert file.read_bytes() == before


def test_merging_in_memory_leaves_the_file(base):
    file = base / "model.safetensors"
    before = file.read_bytes()
    model = load_model(str(base), device="cpu")
    lowrank.wrap(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    name = "model.layers.0.mlp.up_proj.weight"
    unmerged = model.state_dict()[name].clone()
    lowrank.merge(model)
    assert not torch.equal(model.state_dict()[name], unmerged)
    assert file.read_bytes() == before
