"""Adapters trained over quantised bases: the merge is onto the weights that the quantised ones stand for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_gpt2, tiny_llama
from weight_helpers import edit_json, logits, randomise, reload, save_base

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError
from lowrank.models import load_model
from lowrank.quantisers import decoder
from lowrank.storage.tensorfile import TensorFile
from lowrank.weights import merge_checkpoint
from lowrank.weights.merging import blocks

pytest.importorskip("bitsandbytes")

SCHEMES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4 in bf16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "int8": {"load_in_8bit": True},
    "torchao": {"quant_method": "torchao", "bits": 8},
}
TOLERANCE = {"int8": 0.05}  # LLM.int8() rounds the inputs too


# Row lengths are multiples of 64 here: bitsandbytes 0.50's dequantisation on CPUs is wrong for others, and what a CPU
# computes with such a base is then not what its 4-bit weights stand for.


def wide_llama(**overrides: object):
    return tiny_llama(**{"hidden_size": 64, "intermediate_size": 128, **overrides})


def wide_gpt2():
    return tiny_gpt2(n_embd=64)


def quantised(base: Path, scheme: str):
    return load_model(str(base), quantization=SCHEMES[scheme], dtype="float32", device="cpu")


def trained(base: Path, scheme: str, folder: Path) -> tuple[Path, torch.Tensor]:
    """An adapter on attention only: the other quantised weights must come out dequantised all the same."""
    names = ["c_attn"] if base.name == "gpt2" else ["q_proj", "o_proj"]
    model = lowrank.wrap(quantised(base, scheme), LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    randomise(model)
    return lowrank.save(model, folder), logits(model)


@pytest.mark.parametrize(
    ("make", "scheme"),
    [(wide_llama, scheme) for scheme in SCHEMES] + [(wide_gpt2, scheme) for scheme in SCHEMES if scheme != "torchao"],
)
def test_a_dense_folder_is_quantised_as_loading_did(make, scheme: str, tmp_path: Path) -> None:
    base = save_base(make(), tmp_path / make.__name__.removeprefix("wide_"))
    adapter, wanted = trained(base, scheme, tmp_path / "adapter")
    report = merge_checkpoint(base, adapter, tmp_path / "merged", verify="answers")
    assert report.verified is not None
    assert report.verified.logit_error < (0.3 if scheme == "int8" else 1e-4)
    merged = reload(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), wanted, atol=TOLERANCE.get(scheme, 1e-4), rtol=0)
    on_original = merge_checkpoint(base, adapter, tmp_path / "original", onto="original")
    assert any("merged onto the original ones" in note for note in on_original.notes)
    off = (logits(reload(tmp_path / "original")) - wanted).abs().max()
    assert scheme == "int8" or off > 100 * (logits(merged) - wanted).abs().max()
    assert report.changed > on_original.changed
    assert not report.notes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_folder(scheme: str, tmp_path: Path) -> None:
    dense = save_base(wide_llama(), tmp_path / "dense")
    base = tmp_path / "base"
    quantised(dense, scheme).save_pretrained(base)
    adapter, wanted = trained(dense, scheme, tmp_path / "adapter")
    merge_checkpoint(base, adapter, tmp_path / "merged", dtype="float32")
    merged = reload(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged), wanted, atol=TOLERANCE.get(scheme, 1e-4), rtol=0)
    merge_checkpoint(base, adapter, tmp_path / "sixteen")
    tensors = load_file(tmp_path / "sixteen" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.mlp.up_proj.weight"].shape == (128, 64)
    assert tensors.keys() == load_file(dense / "model.safetensors").keys()
    with pytest.raises(InputError, match="original ones are not in it"):
        merge_checkpoint(base, adapter, tmp_path / "no", onto="original")


def test_an_adapter_that_does_not_say(tmp_path: Path) -> None:
    """peft's files do not: then the user does."""
    base = save_base(wide_llama(), tmp_path / "base")
    adapter, wanted = trained(base, "nf4", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    report = merge_checkpoint(base, adapter, tmp_path / "as-if-not")
    assert any("does not say whether its base was quantised" in note for note in report.notes)
    assert not merge_checkpoint(base, adapter, tmp_path / "was-not", quantization={}).notes
    merge_checkpoint(base, adapter, tmp_path / "merged", quantization=SCHEMES["nf4"])
    torch.testing.assert_close(logits(reload(tmp_path / "merged")), wanted, atol=1e-4, rtol=0)


def test_quantising_again_is_refused(tmp_path: Path) -> None:
    base = save_base(wide_llama(), tmp_path / "base")
    adapter, _ = trained(base, "nf4", tmp_path / "adapter")
    with pytest.raises(InputError, match="merged weights are not quantised again"):
        merge_checkpoint(base, adapter, tmp_path / "merged", onto="quantised")


def test_another_kind_of_quantised_base_is_refused(tmp_path: Path) -> None:
    base = save_base(wide_llama(), tmp_path / "base")
    adapter, _ = trained(base, "nf4", tmp_path / "adapter")
    edit_json(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match="quantised with gptq"):
        merge_checkpoint(base, adapter, tmp_path / "merged")


def test_parts_that_do_not_go_together(tmp_path: Path) -> None:
    dense = save_base(wide_llama(), tmp_path / "dense")
    base = tmp_path / "base"
    quantised(dense, "nf4").save_pretrained(base)
    adapter, _ = trained(dense, "nf4", tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight.absmax"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj\.weight do not go together"):
        merge_checkpoint(base, adapter, tmp_path / "merged")


def test_maxima_are_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a large model's would take gigabytes; a block may begin in the middle of a doubly quantised group."""
    dense = save_base(wide_llama(intermediate_size=1024), tmp_path / "dense")
    base = tmp_path / "base"
    quantised(dense, "nf4 double").save_pretrained(base)
    adapter, _ = trained(dense, "nf4 double", tmp_path / "adapter")
    merge_checkpoint(base, adapter, tmp_path / "whole", dtype="float32")
    held: dict[str, int] = {}
    read = TensorFile.read_bytes

    def counted(file: TensorFile, name: str, first: int, last: int) -> torch.Tensor:
        held[name] = max(held.get(name, 0), last - first)
        return read(file, name, first, last)

    monkeypatch.setattr(TensorFile, "read_bytes", counted)
    monkeypatch.setattr(blocks, "BLOCK", 50 * 64)
    merge_checkpoint(base, adapter, tmp_path / "blocks", dtype="float32")
    assert max(size for name, size in held.items() if name.endswith(".absmax")) <= 51
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "blocks"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert whole[name].shape == (1024, 64)
    assert torch.equal(parts[name], whole[name])
    assert torch.equal(parts["model.layers.0.mlp.down_proj.weight"], whole["model.layers.0.mlp.down_proj.weight"])


def test_a_transposed_weight_is_worked_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(wide_gpt2(), tmp_path / "gpt2")
    adapter, wanted = trained(base, "nf4", tmp_path / "adapter")
    made: list[torch.Size] = []
    transposed = decoder._transposed
    monkeypatch.setattr(decoder, "_transposed", lambda given: made.append(given.shape) or transposed(given))
    monkeypatch.setattr(decoder, "_AT_ONCE", 640)
    monkeypatch.setattr(blocks, "BLOCK", 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    merge_checkpoint(base, adapter, tmp_path / "merged")
    assert len(made) == 2 * 4  # layers, and the quantised matrices of each
    torch.testing.assert_close(logits(reload(tmp_path / "merged")), wanted, atol=1e-4, rtol=0)
