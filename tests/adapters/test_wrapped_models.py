"""Models inside torch.compile, DDP, DataParallel and checkpoint wrappers: verbs and files see the model itself."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from tiny import tiny_llama
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError

IDS = torch.arange(3, 15).view(2, 6)
CONFIG = LoraConfig(
    r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=["lm_head"],
    rank_pattern={"layers.1.self_attn.q_proj": 3},
)  # fmt: skip


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def layer_by_layer(wrapper):
    def wrap_layers(model):
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = wrapper(layer)
        return model

    return wrap_layers


WRAPPERS = {
    "torch.compile": compiled,
    "compiled layers": layer_by_layer(compiled),
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda model: compiled(DistributedDataParallel(model)),
    "DataParallel": nn.DataParallel,
    "checkpointed layers": layer_by_layer(checkpoint_wrapper),
}


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group-{os.getpid()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def saved(model, path):
    lowrank.save(model, path, overwrite=True)
    return sorted(safe_open(path / "adapter_model.safetensors", "pt").keys())


@pytest.mark.parametrize("adapter_first", [True, False])
@pytest.mark.parametrize("name", WRAPPERS)
def test_every_verb_sees_through(name, adapter_first, one_process, tmp_path):
    names = saved(lowrank.wrap(tiny_llama(), CONFIG), tmp_path / "plain")
    configs = [(tmp_path / "plain" / "adapter_config.json").read_text()]
    if adapter_first:
        model = WRAPPERS[name](lowrank.wrap(tiny_llama(), CONFIG)).eval()
    else:
        model = WRAPPERS[name](tiny_llama().requires_grad_(True)).eval()
        model(IDS)  # what is compiled by now is compiled again
        assert lowrank.wrap(model, CONFIG) is model
    adapted = model(IDS).logits
    assert saved(model, tmp_path / "saved") == names
    configs.append((tmp_path / "saved" / "adapter_config.json").read_text())
    assert configs[0] == configs[1]
    torch.testing.assert_close(
        lowrank.load(tiny_llama(), tmp_path / "saved")(IDS).logits, adapted, atol=1e-5, rtol=1e-4
    )
    assert len(lowrank.describe(model)["default"].modules) == 5
    assert lowrank.load(model, tmp_path / "plain", "other") is model
    lowrank.set_active(model, "default")
    with lowrank.disabled(model):
        base = model(IDS).logits
    torch.testing.assert_close(base, tiny_llama()(IDS).logits, atol=1e-5, rtol=1e-4)
    with lowrank.routed(model, ["default", None]):
        torch.testing.assert_close(model(IDS).logits, torch.stack([adapted[0], base[1]]), atol=1e-5, rtol=1e-4)
    assert lowrank.merge(model) is model
    torch.testing.assert_close(model(IDS).logits, adapted, atol=1e-4, rtol=1e-4)


def test_unwrap_and_delete_see_through():
    model = compiled(lowrank.wrap(tiny_llama(), CONFIG))
    lowrank.wrap(model, CONFIG, "other")
    lowrank.adapters.delete(model, "other")
    lowrank.unwrap(model)
    assert lowrank.describe(model) == {}
    assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)


@pytest.mark.parametrize("kind", ["replaced", "resized"])
def test_a_module_that_was_replaced_or_resized_is_noticed(kind, tmp_path):
    model = lowrank.wrap(
        tiny_llama(), LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    )
    if kind == "replaced":
        model.lm_head = nn.Linear(32, 320, bias=False)
    else:
        model.resize_token_embeddings(330)
    for verb in (
        lambda: lowrank.save(model, tmp_path / "a"),
        lambda: lowrank.merge(model),
        lambda: lowrank.set_active(model, "default"),
        lambda: lowrank.routed(model, ["default", None]).__enter__(),
    ):
        with pytest.raises(
            InputError, match=r"(was replaced|has another size) since the adapter 'default' was put on it"
        ):
            verb()
    lowrank.unwrap(model)
    assert model(IDS).logits.shape[-1] == (320 if kind == "replaced" else 330)
