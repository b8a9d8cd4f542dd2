"""An adapter fits its base under every name that the base has: text half or whole model, in memory and on disk."""

from __future__ import annotations

import json
from pathlib import Path

import composite_models
import peft
import pytest
import torch
import transformers
from composite_models import TAKEN_OUT, WHOLE, tiny
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from weight_helpers import edit_json, randomise

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.errors import InputError
from lowrank.models import load_model
from lowrank.storage.tensorfile import open_tensors
from lowrank.weights import merge_checkpoint

IDS = torch.arange(3, 15).view(2, 6)
LAYERS = LoraConfig(r=3, rank_pattern={"q_proj": 2})
ENDS = LoraConfig(r=3, target_modules=["lm_head", "embed_tokens", "q_proj"], alpha_pattern={"q_proj": 20})


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def text_half(folder: Path) -> PreTrainedModel:
    return load_model(str(folder), device="cpu")


def check(model: PreTrainedModel, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)


def trained(base: Path, out: Path, config: LoraConfig | AdaLoraConfig) -> torch.Tensor:
    """The logits of the text half with an adapter, which is saved."""
    model = text_half(base)
    before = logits(model)
    lowrank.wrap(model, config)
    randomise(model)
    lowrank.save(model, out)
    assert not torch.allclose(logits(model), before, atol=0.05)
    return logits(model)


def check_all_ways(family: str, config: LoraConfig | AdaLoraConfig, tmp_path: Path) -> None:
    """Trained on the text half: into the checkpoint, onto the whole model, and from there back again."""
    whole_model, base = tiny(TAKEN_OUT[family]), tmp_path / "base"
    whole_model.save_pretrained(base)
    wanted = trained(base, tmp_path / "adapter", config)
    merge_checkpoint(None, tmp_path / "adapter", tmp_path / "merged")
    check(text_half(tmp_path / "merged"), wanted)
    assert open_tensors(tmp_path / "merged/model.safetensors").entries.keys() == (
        open_tensors(base / "model.safetensors").entries.keys()
    )
    whole = lowrank.load(type(whole_model).from_pretrained(base), tmp_path / "adapter")
    check(whole, wanted)
    lowrank.save(whole, tmp_path / "of the whole")
    check(lowrank.load(text_half(base), tmp_path / "of the whole"), wanted)
    merge_checkpoint(None, tmp_path / "of the whole", tmp_path / "merged whole")
    check(type(whole_model).from_pretrained(tmp_path / "merged whole"), wanted)


@pytest.mark.parametrize("family", TAKEN_OUT)
@pytest.mark.parametrize("config", [LAYERS, ENDS], ids=["layers", "ends"])
def test_the_text_half_of_a_whole_checkpoint(family: str, config: LoraConfig, tmp_path: Path) -> None:
    check_all_ways(family, config, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "in_proj_qkv"], bias="lora_only"),
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "o_proj"]),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[4, 9]),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [4, 9]}),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
        LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=[1], alpha_pattern={"down_proj": 30}),
    ],
    ids=["dora", "adalora", "tokens", "tokens by name", "whole modules", "one layer"],
)
def test_every_kind_of_tensor_finds_its_place(config: LoraConfig | AdaLoraConfig, tmp_path: Path) -> None:
    check_all_ways("qwen3_5", config, tmp_path)


def test_experts_find_their_place(tmp_path: Path) -> None:
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=stacks, rank_pattern={"down_proj": 3})
    check_all_ways("qwen3_5_moe", config, tmp_path)


def test_an_adapter_of_the_whole_goes_onto_a_folder_of_the_text_alone(tmp_path: Path) -> None:
    whole_model, base = tiny(TAKEN_OUT["qwen3_5"]), tmp_path / "base"
    whole_model.save_pretrained(base)
    text_half(base).save_pretrained(tmp_path / "text")
    wanted = trained(base, tmp_path / "adapter", LAYERS)
    whole = lowrank.load(type(whole_model).from_pretrained(base), tmp_path / "adapter")
    lowrank.save(whole, tmp_path / "of the whole")
    for adapter in ("adapter", "of the whole"):
        merge_checkpoint(tmp_path / "text", tmp_path / adapter, tmp_path / f"{adapter} merged")
        check(text_half(tmp_path / f"{adapter} merged"), wanted)


def test_an_export_for_a_server_has_the_names_of_the_model_that_it_serves(tmp_path: Path) -> None:
    whole_model, base = tiny(TAKEN_OUT["qwen3_5"]), tmp_path / "base"
    whole_model.save_pretrained(base)
    wanted = trained(base, tmp_path / "adapter", LAYERS)
    lowrank.weights.export(tmp_path / "adapter", tmp_path / "vllm", to="vllm")
    names = open_tensors(tmp_path / "vllm/adapter_model.safetensors").entries
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    check(lowrank.load(type(whole_model).from_pretrained(base), tmp_path / "vllm"), wanted)
    check(lowrank.load(text_half(base), tmp_path / "vllm"), wanted)


@pytest.mark.parametrize("family", WHOLE)
def test_whole_models_merge_under_their_files_names(family: str, tmp_path: Path) -> None:
    model = tiny(WHOLE[family])
    model.save_pretrained(tmp_path / "base")
    lowrank.wrap(model, ENDS)
    randomise(model)
    wanted = logits(model)
    lowrank.save(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    check(type(model).from_pretrained(tmp_path / "merged"), wanted)


OLD = {  # whole model -> a stretch of its names now, and before transformers 4.52
    "llava": ("model.model.language_model", "model.language_model.model"),
    "gemma3": ("model.model.language_model", "model.language_model.model"),
    "mistral3": ("model.model.language_model", "model.language_model.model"),
    "qwen2_5_vl": ("model.model.language_model", "model.model"),
}


@pytest.mark.parametrize("family", OLD)
def test_names_of_older_releases_load_and_merge(family: str, tmp_path: Path) -> None:
    model = tiny(WHOLE[family])
    model.save_pretrained(tmp_path / "base")
    targets = r".*language_model.*\.(q_proj|down_proj)"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    randomise(wrapped)
    wanted, adapter = logits(wrapped), tmp_path / "adapter"
    wrapped.save_pretrained(adapter)
    now, before = OLD[family]
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(now in name for name in tensors)
    renamed = {name.replace(now, before): value for name, value in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    edit_json(adapter / "adapter_config.json", target_modules=targets.replace("language_model", before.split(".")[-1]))
    check(lowrank.load(type(model).from_pretrained(tmp_path / "base"), adapter), wanted)
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    check(type(model).from_pretrained(tmp_path / "merged"), wanted)


def test_a_tower_for_images_is_no_text_model(tmp_path: Path) -> None:
    model = tiny(composite_models.llava)
    lowrank.wrap(model, LoraConfig(r=2, target_modules=r".*vision_tower.*q_proj"))
    lowrank.save(model, tmp_path / "adapter")
    text = transformers.AutoModelForCausalLM.from_config(model.config.text_config)
    with pytest.raises(InputError, match=r"matches no module|unexpected"):
        lowrank.load(text, tmp_path / "adapter")


def test_fingerprints_that_name_the_whole_models_type_are_known(tmp_path: Path) -> None:
    """Files that were written before the text model's type stood there."""
    whole_model, base = tiny(TAKEN_OUT["qwen3_5"]), tmp_path / "base"
    whole_model.save_pretrained(base)
    wanted = trained(base, tmp_path / "adapter", LAYERS)
    weights = tmp_path / "adapter/adapter_model.safetensors"
    metadata = open_tensors(weights).metadata
    note = json.loads(metadata["lowrank.base"])
    assert note["model_type"] == "qwen3_5_text"
    metadata = dict(metadata) | {"lowrank.base": json.dumps(note | {"model_type": "qwen3_5"})}
    save_file(load_file(weights), weights, metadata)
    check(lowrank.load(text_half(base), tmp_path / "adapter"), wanted)
    check(lowrank.load(type(whole_model).from_pretrained(base), tmp_path / "adapter"), wanted)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    check(text_half(tmp_path / "merged"), wanted)
    save_file(load_file(weights), weights, metadata | {"lowrank.base": json.dumps(note | {"model_type": "llama"})})
    with pytest.raises(InputError, match=r"model_type llama \(here qwen3_5_text\)"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "other")
