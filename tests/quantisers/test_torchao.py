"""torchao's int8 weights: adapters over them, in memory and on disk, against peft and the dequantised weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, PerGroup, quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.errors import InputError
from lowrank.models import load_model
from lowrank.quantisers import torchao
from lowrank.quantisers.registry import quantiser_of
from lowrank.weights import merge_checkpoint
from lowrank.weights.files.adapter_file import open_adapter

INT8 = {"quant_method": "torchao", "bits": 8}
IDS = torch.arange(3, 23)[None]
METHODS = {
    "lora": LoraConfig(r=4, init_lora_weights=False),
    "dora": LoraConfig(r=4, init_lora_weights=False, use_dora=True),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, init_lora_weights=False, lora_alpha=0.05),
}


@pytest.fixture(params=["float32", "bfloat16"])
def files(request, tmp_path: Path) -> Path:
    """A base on disk, in that dtype."""
    tiny_llama(hidden_size=64, intermediate_size=128).to(getattr(torch, request.param)).save_pretrained(
        tmp_path / "base"
    )
    return tmp_path / "base"


def quantised(folder: Path, dtype: str = "float32"):
    return load_model(str(folder), dtype=dtype, quantization=INT8, device="cpu")


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name.removeprefix("base_model.model.").replace("adapters.default.", ""): g for name, g in named.items()}


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_gradients_are_those_of_the_dequantised_base(config, files: Path):
    model = quantised(files)
    twin = AutoModelForCausalLM.from_pretrained(files, dtype=torch.float32).eval()
    held = {path: module for path, module in model.named_modules() if quantiser_of(module) is not None}
    assert len(held) == 14
    for path, module in held.items():
        twin.get_submodule(path).weight.data.copy_(module.weight.dequantize())
    for wrapped in (model, twin):
        torch.manual_seed(0)
        lowrank.wrap(wrapped, config)
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-4, atol=1e-6)
    before = model(IDS).logits
    torch.testing.assert_close(lowrank.merge(model)(IDS).logits, before, rtol=1e-4, atol=1e-5)
    assert {type(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Parameter}
    assert getattr(model.config, "quantization_config", None) is None


def test_as_in_peft(files: Path, tmp_path: Path):
    model = lowrank.wrap(quantised(files), METHODS["lora"])
    lowrank.save(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(
        files, dtype=torch.float32, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map={"": "cpu"}
    )
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits)
    ours = gradients(model)
    wanted = {name.replace(".default.weight", ""): gradient for name, gradient in gradients(theirs).items()}
    assert ours.keys() == wanted.keys()
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loaded", ["float32", "bfloat16"])
def test_on_disk_it_is_merged_onto_what_the_weights_stood_for(loaded: str, files: Path, tmp_path: Path):
    """Scales come out otherwise in another dtype: the adapter's file says which."""
    model = lowrank.wrap(quantised(files, loaded), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    lowrank.save(model, tmp_path / "adapter")
    report = merge_checkpoint(files, tmp_path / "adapter", tmp_path / "merged", dtype="float32", verify="answers")
    assert report.verified is not None
    own = load_file(files / "model.safetensors")["lm_head.weight"].dtype
    rounded = (own, loaded) == (torch.float32, "bfloat16")  # embedding, norms and head, in training
    assert report.verified.logit_error < (0.2 if rounded else 1e-3)
    merged = load_file(tmp_path / "merged/model.safetensors")
    layer = model.model.layers[1]
    dense = layer.mlp.up_proj.weight.dequantize(torch.float32)
    torch.testing.assert_close(merged["model.layers.1.mlp.up_proj.weight"], dense, rtol=1e-6, atol=1e-8)
    lora = layer.self_attn.q_proj.adapters["default"]
    wanted = layer.self_attn.q_proj.weight.dequantize(torch.float32) + lora.scale * (
        lora.lora_B.float() @ lora.lora_A.float()
    )
    torch.testing.assert_close(merged["model.layers.1.self_attn.q_proj.weight"], wanted, rtol=1e-5, atol=1e-7)


def test_an_adapter_whose_file_does_not_say(files: Path, tmp_path: Path):
    """peft's do not: then the user does, and it was loaded in the files' dtype."""
    adapter = lowrank.save(lowrank.wrap(quantised(files, "auto"), METHODS["lora"]), tmp_path / "adapter")
    merge_checkpoint(files, adapter, tmp_path / "noted", dtype="float32")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    options = {"quantization": INT8, "dtype": "float32", "verify": "answers"}
    report = merge_checkpoint(files, adapter, tmp_path / "told", **options)
    assert report.verified is not None
    assert report.verified.logit_error < 1e-3
    noted, told = (load_file(tmp_path / name / "model.safetensors") for name in ("noted", "told"))
    assert all(torch.equal(told[name], tensor) for name, tensor in noted.items())


def stored(files: Path, out: Path, how) -> Path:
    model = AutoModelForCausalLM.from_pretrained(
        files, quantization_config=TorchAoConfig(how), device_map={"": "cpu"}, dtype=torch.float32
    )
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("granularity", [None, PerGroup(32)], ids=["rows", "groups"])
def test_a_folder_that_holds_quantised_weights(granularity, files: Path, tmp_path: Path):
    how = Int8WeightOnlyConfig() if granularity is None else Int8WeightOnlyConfig(granularity=granularity)
    base = stored(files, tmp_path / "quantised", how)
    model = lowrank.wrap(load_model(str(base), device="cpu"), METHODS["lora"])
    lowrank.save(model, tmp_path / "adapter")
    with pytest.raises(InputError, match="original ones are not in it"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", onto="original")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    assert load_file(tmp_path / "merged/model.safetensors").keys() == load_file(files / "model.safetensors").keys()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_weights_that_round_their_inputs_are_refused(files: Path, tmp_path: Path):
    base = stored(files, tmp_path / "quantised", Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(InputError, match="its weight is stored as Int8Tensor"):
        lowrank.wrap(load_model(str(base), device="cpu"), METHODS["lora"])
    lowrank.save(lowrank.wrap(quantised(files), METHODS["lora"]), tmp_path / "adapter")
    with pytest.raises(InputError, match="is quantised otherwise than torchao's Int8WeightOnlyConfig"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")


def damaged_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj._weight_scale"] = torch.ones(5, 1)


def lost_values(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.up_proj._weight_qdata"]


def lost_scale(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.up_proj._weight_scale"]


def twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(128, 64)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_scale, r"up_proj\.weight do not go together"),
        (lost_values, r"up_proj\.weight do not go together"),
        (lost_scale, r"up_proj\.weight do not go together"),
        (twice, "in the file twice"),
    ],
)
def test_damaged_folders(damage, message: str, files: Path, tmp_path: Path):
    base = stored(files, tmp_path / "quantised", Int8WeightOnlyConfig())
    lowrank.save(lowrank.wrap(quantised(files), METHODS["lora"]), tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    damage(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_that_was_quantised_by_hand_is_not_said_to_be_dense(tmp_path: Path):
    model = tiny_llama()
    quantize_(model, Int8WeightOnlyConfig())
    lowrank.save(lowrank.wrap(model, METHODS["lora"]), tmp_path)
    assert open_adapter(tmp_path).quantization is None


def test_what_it_was_quantised_from_is_noted(files: Path, tmp_path: Path):
    lowrank.save(lowrank.wrap(quantised(files, "bfloat16"), METHODS["lora"]), tmp_path / "adapter")
    noted = open_adapter(tmp_path / "adapter").quantization
    assert noted is not None
    assert (noted["quant_method"], noted["dtype"]) == ("torchao", "bfloat16")
    again = load_model(str(files), dtype=noted["dtype"], quantization=json.loads(json.dumps(noted)), device="cpu")
    assert quantiser_of(again.model.layers[0].mlp.up_proj).name == "torchao"


def test_what_it_does_not_do(files: Path, monkeypatch):
    with pytest.raises(InputError, match="8 bits here, and bits is 4") as refused:
        load_model(str(files), quantization={"quant_method": "torchao", "bits": 4})
    assert refused.value.where == "quantization.bits"
    with pytest.raises(InputError, match="there is no quantiser 'gptq'"):
        load_model(str(files), quantization={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match="are not sharded"):
        torchao.TorchAo().shard(nn.Linear(2, 2))
    monkeypatch.setattr(torchao, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs torchao"):
        load_model(str(files), quantization=INT8)
