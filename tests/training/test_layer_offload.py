"""Two slots and their copies, on pretended streams: values, pinned memory, one layer ahead, never more than two."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from pretended_streams import Card
from tiny import tiny_gemma2, tiny_gpt2, tiny_llama, tiny_qwen2

from lowrank.adapters import LoraConfig, wrap
from lowrank.errors import InputError
from lowrank.training.transforms import layer_offload
from lowrank.training.transforms.device_slots import DeviceSlots
from lowrank.training.transforms.layer_offload import Offloaded, offload_layers

LAYERS = 5
MODELS = {
    "llama": lambda: tiny_llama(num_hidden_layers=LAYERS),
    "tied": lambda: tiny_llama(num_hidden_layers=LAYERS, tie_word_embeddings=True),
    "qwen2": lambda: tiny_qwen2(num_hidden_layers=LAYERS),
    "gemma2": lambda: tiny_gemma2(num_hidden_layers=LAYERS),
    "gpt2": lambda: tiny_gpt2(n_layer=LAYERS),
}
IDS = torch.arange(3, 43)[None]


def adapted(name: str, **changes: Any) -> Any:
    model = wrap(MODELS[name](), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, **changes))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model.train()


def loss_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def passes(model: Any) -> list[torch.Tensor]:
    """Losses and gradients of two steps, an evaluation between them, and a step without dropout, out of training."""
    torch.manual_seed(7)
    found = []
    for training in (True, True, False):
        model.train(training).zero_grad()
        loss = loss_of(model)
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        model.eval()
        with torch.no_grad():
            found += [loss_of(model), loss_of(model)]
    return found


@pytest.fixture
def card(monkeypatch):
    """The host computes, as if it were a card."""
    monkeypatch.setattr(layer_offload, "FilePages", lambda blocks: DeviceSlots(blocks, torch.device("cpu")))
    return Card().installed(monkeypatch)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_layers_that_stay(card, name, dora):
    expected = passes(adapted(name, use_dora=dora))
    model = adapted(name, use_dora=dora)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    offload_layers(model, torch.device("cpu"))
    with card:
        found = passes(model)
    assert len(found) == len(expected) > 9
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_each_layer_is_copied_while_another_computes(card):
    model = adapted("llama")
    layer = sum(p.nbytes for name, p in model.model.layers[0].named_parameters() if p.dim() == 2 and "lora" not in name)
    offload_layers(model, torch.device("cpu"))
    with card:
        for _ in range(2):
            loss_of(model).backward()
    first, *others = card.asked
    assert {copy.source.nbytes for copy in card.asked} == {layer}
    assert len({copy.target.untyped_storage().data_ptr() for copy in card.asked}) == 2
    assert len(card.asked) == LAYERS + 2 * (LAYERS - 2) + (LAYERS - 2)  # where a pass turns round two are there
    assert first.waited_at == first.asked_at  # nothing to compute yet
    computed = [(copy.waited_at or 0) - copy.asked_at for copy in others if copy.waited_at is not None]
    assert len(computed) == len(others)
    assert min(computed) > 20


class Missing(DeviceSlots):
    """Lays the next layer over the one that computes."""

    def _other(self, slot: Any) -> Any:
        return slot


def test_an_overwritten_layer_would_be_seen(card, monkeypatch):
    monkeypatch.setattr(layer_offload, "FilePages", lambda blocks: Missing(blocks, torch.device("cpu")))
    expected = passes(adapted("llama"))
    model = adapted("llama")
    offload_layers(model, torch.device("cpu"))
    with card:
        assert not torch.equal(passes(model)[0], expected[0])


def test_70b_holds_two_layers(monkeypatch):
    """A Llama of 70B parameters by its shapes alone: what the slots take, and what is never there with the rest."""
    card = Card(values=False).installed(monkeypatch)
    monkeypatch.setattr(
        "lowrank.training.transforms.device_slots.psutil.virtual_memory", lambda: SimpleNamespace(available=2**38)
    )
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False).get_input_embeddings().requires_grad_(True)  # the backward pass goes all the way
    offloaded = offload_layers(model, torch.device("meta"))
    model.train()
    with card:
        mask = torch.ones(1, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool, device="meta")
        model(input_ids=IDS.to("meta"), attention_mask=mask, use_cache=False).logits.sum().backward()
    layer = 2 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert list(offloaded.layers) == [layer] * 80
    assert offloaded.elsewhere == 78 * layer
    assert {copy.target.untyped_storage().nbytes() for copy in card.asked} == {layer}
    assert len({copy.target.untyped_storage()._cdata for copy in card.asked}) == 2
    assert len(card.asked) == 80 + 78
    resident = sum(p.nbytes for name, p in model.named_parameters() if ".layers." not in name) + 2 * layer
    assert resident < 8 * 2**30 < 132 * 2**30 < sum(offloaded.layers) + resident


def test_a_host_without_room_is_refused(card, monkeypatch):
    monkeypatch.setattr(
        "lowrank.training.transforms.device_slots.psutil.virtual_memory", lambda: SimpleNamespace(available=1000)
    )
    with pytest.raises(InputError, match="GiB of the host's memory"):
        offload_layers(adapted("llama"), torch.device("cpu"))


def test_memory_that_cannot_be_pinned_is_told(card, monkeypatch):
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(InputError, match="cannot pin"):
        offload_layers(adapted("llama"), torch.device("cpu"))


def test_a_base_that_trains_is_refused(card):
    with pytest.raises(InputError, match="no frozen matrices"):
        offload_layers(tiny_llama(), torch.device("cpu"))


def test_layers_in_few_bits_are_refused(card):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = adapted("llama")
    model.model.layers[1].mlp.up_proj = bitsandbytes.nn.Linear4bit(32, 48, bias=False)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj is held in few bits by bitsandbytes"):
        offload_layers(model, torch.device("cpu"))


def test_what_accelerate_moves_is_refused(card):
    model = adapted("llama")
    add_hook_to_module(model.model.norm, ModelHook())
    with pytest.raises(InputError, match=r"accelerate moves the weights of model\.norm already"):
        offload_layers(model, torch.device("cpu"))


def test_layers_that_do_not_recompute_are_refused(card):
    model = adapted("llama")
    model._no_split_modules = ["LlamaMLP"]
    with pytest.raises(InputError, match=r"LlamaMLP\) do not recompute"):
        offload_layers(model, torch.device("cpu"))


def test_what_layers_share_stays(card):
    model = adapted("llama")
    layers = model.model.layers
    layers[3].mlp.down_proj.weight = layers[1].mlp.down_proj.weight
    expected = passes(model)
    shared = layers[1].mlp.down_proj.weight
    offloaded = offload_layers(model, torch.device("cpu"))
    assert layers[1].mlp.down_proj.weight is layers[3].mlp.down_proj.weight is shared
    assert offloaded.layers[1] == offloaded.layers[3] == offloaded.layers[0] - shared.nbytes
    with card:
        found = passes(model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_never_together_is_all_but_the_two_largest_neighbours():
    assert Offloaded([5, 1, 4, 3], "").elsewhere == 6
    assert Offloaded([5], "").elsewhere == 0
