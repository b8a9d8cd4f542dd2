"""Adapters on single experts of a model that holds all of them in one parameter, against the plain formula."""

from __future__ import annotations

import copy

import pytest
import torch
from expert_models import model_of
from torch import nn

import lowrank
from lowrank import LoraConfig
from lowrank.adapters import adapter_tensors
from lowrank.errors import InputError
from lowrank.weights import merge_checkpoint

IDS = torch.arange(1, 25).view(2, 12)
NAMES = ["experts.3.up_proj", "experts.0.gate_proj", "experts.3.gate_proj", "experts.1.down_proj"]


def adapted(base: nn.Module, targets: list[str] = NAMES, **fields: object) -> nn.Module:
    model = lowrank.wrap(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=3, target_modules=targets, **fields))
    for tensor in adapter_tensors(model, "default").values():
        tensor += 0.3 * torch.randn_like(tensor)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@torch.no_grad()
def plain(base: nn.Module, model: nn.Module, scale: float = 1.5) -> nn.Module:
    """The base with s·B·A added to the very rows of that expert."""
    base, tensors = copy.deepcopy(base), adapter_tensors(model, "default")
    for name in [name for name in tensors if ".experts." in name and name.endswith("lora_A.weight")]:
        delta = scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        path, _, rest = name.partition(".experts.")
        expert, projection = rest.split(".")[:2]
        module = base.get_submodule(f"{path}.experts")
        weight = module.down_proj if projection == "down_proj" else module.gate_up_proj
        first = weight.shape[1] // 2 if projection == "up_proj" else 0
        weight[int(expert), first : first + delta.shape[0]] += delta
    return base


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "qwen2_moe"])
def test_they_act_merge_and_come_back(name, tmp_path):
    torch.manual_seed(0)
    base = model_of(name).eval()
    model = adapted(base)
    expected = logits(plain(base, model))
    assert (expected - logits(base)).abs().max() > 1e-4
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    assert any(key.endswith("mlp.experts.3.up_proj.lora_A.weight") for key in adapter_tensors(model, "default"))
    logits(model).sin().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    lowrank.save(model, tmp_path / "a")
    back = lowrank.load(copy.deepcopy(base), tmp_path / "a")
    torch.testing.assert_close(logits(back), expected, atol=1e-5, rtol=1e-4)
    lowrank.save(back, tmp_path / "b")
    files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in "ab"]
    assert len(files[0]) == len(files[1])
    base.save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "b", tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(lowrank.merge(model)), expected, atol=1e-5, rtol=1e-4)


def test_beside_other_modules_ranks_of_their_own_and_another_adapter():
    torch.manual_seed(0)
    base = model_of("qwen3_moe").eval()
    model = adapted(base, [*NAMES, "q_proj"], rank_pattern={"experts.3.up_proj": 3}, alpha_pattern={"up_proj": 4.5})
    alone = lowrank.merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(alone), logits(model), atol=1e-5, rtol=1e-4)
    stack = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"], init_lora_weights=False)
    lowrank.wrap(model, stack, "stack")
    lowrank.set_active(model, ["default", "stack"])
    expected = logits(model)
    torch.testing.assert_close(logits(lowrank.merge(model)), expected, atol=1e-5, rtol=1e-4)


def test_a_file_of_an_older_transformers_names_projections_alone(tmp_path):
    """There each expert was a module, and "up_proj" meant every one of them."""
    torch.manual_seed(0)
    base = model_of("qwen3_moe").eval()
    model = adapted(base, [f"experts.{n}.up_proj" for n in range(4)])
    lowrank.save(model, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    lines = config.read_text().split('"target_modules"')
    config.write_text(lines[0] + '"target_modules": ["up_proj"]' + lines[1][lines[1].index("]") + 1 :])
    torch.testing.assert_close(logits(lowrank.load(copy.deepcopy(base), tmp_path / "a")), logits(model))


def test_what_does_not_fit_is_refused():
    base = model_of("qwen3_moe")
    for fields, message in (
        ({"use_dora": True}, "takes plain LoRA alone"),
        ({"init_lora_weights": "pissa"}, "takes plain LoRA alone"),
        ({"target_modules": ["experts.99.up_proj"]}, "matches no module"),
    ):
        with pytest.raises(InputError, match=message):
            lowrank.wrap(base, LoraConfig(**{"r": 2, "target_modules": NAMES, **fields}))
    model = adapted(base, lora_dropout=0.1)
    with pytest.raises(InputError, match="lora_dropout has no input to drop on single experts"):
        model.train()(IDS)
