"""Layers in a mapped file: two are in memory at a time, and a page that was written to is never given back."""

from __future__ import annotations

import os
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import tiny_llama

from lowrank.adapters import LoraConfig, wrap
from lowrank.models import load_model
from lowrank.training.transforms.file_pages import FilePages
from lowrank.training.transforms.held_weights import Held
from lowrank.training.transforms.layer_offload import offload_layers

LAYERS, PAGE = 5, os.sysconf("SC_PAGE_SIZE")
IDS = torch.arange(3, 43)[None]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's table of pages")


@pytest.fixture
def model(tmp_path):
    """Layers of 4 MiB, in a file."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": LAYERS}
    tiny_llama(**sizes).save_pretrained(tmp_path)
    return wrap(load_model(str(tmp_path), device="cpu"), LoraConfig(r=4, target_modules="all-linear"))


def present(weight: torch.Tensor) -> int:
    """How many of the weight's inner pages this process has in memory."""
    first, last = -(-weight.data_ptr() // PAGE), (weight.data_ptr() + weight.nbytes) // PAGE
    with open("/proc/self/pagemap", "rb", buffering=0) as table:
        entries = np.frombuffer(os.pread(table.fileno(), 8 * (last - first), 8 * first), dtype=np.uint64)
    return int((entries >> np.uint64(63)).sum())


def frozen(layer: torch.nn.Module) -> list[Held]:
    modules = (module for module in layer.modules() if isinstance(module, torch.nn.Linear))
    return [Held(module, "weight", module.weight) for module in modules]


def layers_present(model: torch.nn.Module) -> set[int]:
    """Those of which more is there than the 16 pages that Linux maps around each one that is touched."""
    layers = model.get_submodule("model.layers").children()
    return {at for at, layer in enumerate(layers) if sum(present(held.parameter) for held in frozen(layer)) > 32}


def test_two_layers_are_there_at_a_time(model):
    seen: list[set[int]] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda *_: seen.append(layers_present(model)))
    offload_layers(model, torch.device("cpu"))
    assert layers_present(model) == set()
    model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(seen) == 2 * LAYERS
    forward, backward = seen[:LAYERS], seen[LAYERS:]
    assert all(at in there and there <= {at, at + 1} for at, there in enumerate(forward[:-1]))
    assert all(
        at in there and there <= {at - 1, at, at + 1} for at, there in zip(range(LAYERS)[::-1], backward, strict=True)
    )
    assert max(map(len, seen)) == 2
    assert layers_present(model) <= {0, 1}


def test_without_it_all_layers_are_there(model):
    model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert layers_present(model) == set(range(LAYERS))


def test_a_page_that_was_written_to_stays(model):
    weight = model.model.layers[2].mlp.up_proj.weight
    with torch.no_grad():
        weight[500] = 7.0
    expected = weight.detach().clone()
    pages = FilePages([frozen(layer) for layer in model.model.layers])
    for at, then in pairwise([*range(LAYERS), *range(LAYERS)[::-1]]):
        pages.enter(at, then)
    with torch.no_grad():
        weight[501] = 8.0
    expected[501] = 8.0
    pages.enter(4, 3)
    assert 0 < present(weight) < weight.nbytes // PAGE // 2
    assert torch.equal(weight, expected)
