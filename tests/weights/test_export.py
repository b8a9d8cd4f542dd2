"""Exports obey the rules of the programs that read them, as those stand in their own sources."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_llama
from weight_helpers import logits, randomise, reload, save_base, with_peft

import lowrank
from lowrank import AdaLoraConfig, LoraConfig
from lowrank.errors import InputError, JobError
from lowrank.weights import export

UNEVEN = LoraConfig(
    r=4,
    lora_alpha=10,
    use_rslora=True,
    rank_pattern={"k_proj": 2},
    alpha_pattern={"v_proj": 3},
    target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
    init_lora_weights=False,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tiny_llama(), tmp_path / "base")


def make(base: Path, config: object, name: str = "adapter") -> tuple[Path, torch.Tensor]:
    model = lowrank.wrap(reload(base), config)
    randomise(model, 0.1)
    return lowrank.save(model, base.parent / name), logits(model)


def vllm_reads(folder: Path, linear_names: set[str]) -> dict[str, torch.Tensor]:
    """What vLLM (lora/peft_helper.py, lora/utils.py, lora/lora_model.py) makes of a folder: ΔW by module."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config["r"], int)
    assert config["r"] > 0
    assert isinstance(config["lora_alpha"], int)
    assert config["target_modules"]
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert config["bias"] == "none"
    # One factor for all modules, whatever rank_pattern and alpha_pattern say.
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        pieces = name.split(".")
        assert name.startswith("base_model.model.")
        assert pieces[-1] == "weight"
        assert pieces[-2] in ("lora_A", "lora_B")
        module = ".".join(pieces[2:-2])
        assert module.rsplit(".", 1)[-1] in linear_names
        assert tensor.shape[0 if pieces[-2] == "lora_A" else 1] <= config["r"]
        parts.setdefault(module, {})[pieces[-2]] = tensor
    return {module: scale * pair["lora_B"] @ pair["lora_A"] for module, pair in parts.items()}


def llama_cpp_reads(folder: Path, layers: int) -> dict[str, torch.Tensor]:
    """What llama.cpp's convert_lora_to_gguf.py and its run time make of a folder: ΔW by module."""
    alpha = float(json.loads((folder / "adapter_config.json").read_text())["lora_alpha"])
    assert json.loads((folder / "base" / "config.json").read_text())["architectures"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        base_name = name.replace("base_model.model.", "")
        for end in (".lora_A.weight", ".lora_B.weight"):
            base_name = base_name.replace(end, ".weight")
        is_a, is_b = ".lora_A.weight" in name, ".lora_B.weight" in name
        if not is_a and not is_b:
            assert "_layernorm" in name or ".norm" in name, f"Unexpected name {name}"
            assert tensor.dim() == 1
        else:
            parts.setdefault(base_name.removesuffix(".weight"), {})["A" if is_a else "B"] = tensor
        assert names.get_name(base_name, try_suffixes=(".weight", ".bias")) is not None
    # llama-adapter.h: scale = alpha / rank of the tensor
    return {module: alpha / pair["B"].shape[1] * pair["B"] @ pair["A"] for module, pair in parts.items()}


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    before = dict(reload(base).named_parameters())
    merged = lowrank.merge(lowrank.load(reload(base), adapter))
    return {name: p.data - before[name].data for name, p in merged.named_parameters() if "proj" in name}


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("config", [UNEVEN, AdaLoraConfig(init_r=4, target_r=2, total_step=9, init_lora_weights=False)])
def test_the_program_reads_the_same_effect(base: Path, config: object, target: str, tmp_path: Path) -> None:
    adapter, wanted = make(base, config)
    report = export(adapter, tmp_path / "out", to=target)
    linear = {name.rpartition(".")[2] for name, m in tiny_llama().named_modules() if isinstance(m, torch.nn.Linear)}
    found = vllm_reads(tmp_path / "out", linear) if target == "vllm" else llama_cpp_reads(tmp_path / "out", 2)
    exact = {name.removesuffix(".weight"): d for name, d in deltas(base, adapter).items() if d.abs().max() > 0}
    assert found.keys() == exact.keys()
    for module, delta in exact.items():
        torch.testing.assert_close(found[module], delta, atol=1e-6, rtol=1e-5)
    assert str(tmp_path / "out") in report.command
    torch.testing.assert_close(with_peft(base, tmp_path / "out"), wanted, atol=1e-5, rtol=0)


def test_llama_cpp_takes_whole_norms(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["model.norm", "input_layernorm"])
    adapter, _ = make(base, config)
    export(adapter, tmp_path / "out", to="llama.cpp")
    llama_cpp_reads(tmp_path / "out", 2)
    with pytest.raises(InputError, match=r"vLLM cannot express modules_to_save: model\.norm"):
        export(adapter, tmp_path / "no", to="vllm")


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save: lm_head"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]), "trainable_token_indices"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(
    base: Path, config: LoraConfig, why: str, target: str, tmp_path: Path
) -> None:
    adapter, _ = make(base, config)
    with pytest.raises(InputError, match=f"cannot express {why}"):
        export(adapter, tmp_path / "out", to=target)
    assert not (tmp_path / "out").exists()


def test_ranks_that_vllm_does_not_take(base: Path, tmp_path: Path) -> None:
    adapter, _ = make(base, LoraConfig(r=513, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="ranks up to 512, and this adapter has 513"):
        export(adapter, tmp_path / "out", to="vllm")
    assert not (tmp_path / "out").exists()
    adapter, _ = make(base, LoraConfig(r=257, target_modules=["q_proj"]), "fits")
    assert export(adapter, tmp_path / "out", to="vllm").command.endswith("--max-lora-rank 320")


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_embeddings(base: Path, target: str, tmp_path: Path) -> None:
    """Both take `lora_embedding_A` (r, tokens) and `lora_embedding_B` (dim, r), without `.weight`, at the one scale."""
    config = LoraConfig(r=4, lora_alpha=10, rank_pattern={"q_proj": 2}, target_modules=["embed_tokens", "q_proj"])
    adapter, wanted = make(base, config)
    export(adapter, tmp_path / "out", to=target)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{x}"] for x in "AB")
    before = reload(base).model.embed_tokens.weight
    merged = lowrank.merge(lowrank.load(reload(base), adapter)).model.embed_tokens.weight
    torch.testing.assert_close(before + (B @ A).T, merged, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(with_peft(base, tmp_path / "out"), wanted, atol=1e-5, rtol=0)


def test_a_tied_head(tmp_path: Path) -> None:
    base = save_base(tiny_llama(tie_word_embeddings=True), tmp_path / "tied")
    adapter, _ = make(base, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(InputError, match="no head of its own"):
        export(adapter, tmp_path / "out", to="llama.cpp")


def test_one_file(base: Path, tmp_path: Path) -> None:
    adapter, wanted = make(base, UNEVEN)
    out = tmp_path / "one.safetensors"
    export(adapter, out, to="safetensors")
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["adapter_config"])["lora_alpha"] == 10
    torch.testing.assert_close(logits(lowrank.load(reload(base), out)), wanted, atol=0, rtol=0)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(InputError, match="the file exists"):
        export(adapter, out, to="safetensors")
    with pytest.raises(InputError, match="must end in"):
        export(adapter, tmp_path / "one.bin", to="safetensors")
    with pytest.raises(InputError, match="no target 'ollama'"):
        export(adapter, tmp_path / "x", to="ollama")


def test_a_full_disk_leaves_no_file(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _ = make(base, UNEVEN)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(JobError, match="disk is full"):
        export(adapter, tmp_path / "new" / "one.safetensors", to="safetensors")
    assert not list((tmp_path / "new").iterdir())
