"""Bases whose weights are elsewhere while nothing runs: exact, or refused before anything changes."""

from __future__ import annotations

import accelerate
import pytest
import torch
import transformers
from tiny import tiny_llama

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError

IDS = torch.arange(3, 15).view(2, 6)
PLACES = {
    "model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


def cpu_offloaded(folder):
    model = tiny_llama()
    accelerate.cpu_offload(model, execution_device="cpu")
    return model


def disk_offloaded(folder):
    model = tiny_llama()
    accelerate.disk_offload(model, folder / "offload", execution_device="cpu")
    return model


def by_device_map(folder):
    tiny_llama().save_pretrained(folder / "base")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=PLACES, offload_folder=folder / "offload"
    ).eval()


@pytest.mark.parametrize(
    "fields", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"target_modules": ["embed_tokens", "q_proj"]}]
)
@pytest.mark.parametrize("offloaded", [cpu_offloaded, disk_offloaded, by_device_map])
def test_adapters_on_an_offloaded_base(offloaded, fields, tmp_path):
    model, here = offloaded(tmp_path), tiny_llama()
    base = model(IDS).logits
    for each in (model, here):
        torch.manual_seed(0)
        lowrank.wrap(each, LoraConfig(r=2, **fields))
    torch.testing.assert_close(model(IDS).logits, base, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        for each in (model, here):
            torch.manual_seed(1)
            for parameter in (p for n, p in each.named_parameters() if ".adapters." in n):
                parameter += 0.2 * torch.randn_like(parameter)
    outputs = [each(IDS).logits for each in (model, here)]
    torch.testing.assert_close(*outputs)
    gradients = []
    for each, output in zip((model, here), outputs, strict=True):
        output.square().sum().backward()
        gradients.append([p.grad for n, p in each.named_parameters() if ".adapters." in n])
    torch.testing.assert_close(*gradients)
    lowrank.save(model, tmp_path / "adapter")
    loaded = lowrank.load(offloaded(tmp_path / "again"), tmp_path / "adapter")
    torch.testing.assert_close(loaded(IDS).logits, outputs[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="is offloaded, and cannot be merged"):
        lowrank.merge(model)
    assert torch.equal(model(IDS).logits, outputs[0])
    lowrank.unwrap(model)
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("fields", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}])
def test_what_would_need_the_weights_themselves_is_refused(fields, tmp_path):
    model = cpu_offloaded(tmp_path)
    base = model(IDS).logits
    with pytest.raises(InputError, match="is offloaded, and only factors"):
        lowrank.wrap(model, LoraConfig(target_modules=["q_proj"], **fields))
    assert lowrank.describe(model) == {}
    assert torch.equal(model(IDS).logits, base)


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(InputError, match="they have no values"):
        lowrank.wrap(model, LoraConfig(target_modules=["q_proj"]))
