"""What peft adapts besides plain weights, merged on disk: peft writes, and the merged folder answers as peft's model."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import VOCAB, tiny_gpt2, tiny_llama, tiny_qwen2
from weight_helpers import IDS, logits, peft_adapter, randomise, reload, save_base

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError
from lowrank.weights import merge_checkpoint
from lowrank.weights.adapter_info import summarise


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize(("make", "targets"), [(tiny_gpt2, ["c_attn", "c_fc"]), (tiny_qwen2, ["q_proj", "k_proj"])])
def test_merged_on_disk(make, targets, bias, tmp_path: Path):
    base = save_base(make(), tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_bias=True, bias=bias, target_modules=targets, init_lora_weights=False)
    expected = peft_adapter(base, tmp_path / "adapter", config)
    torch.testing.assert_close(logits(lowrank.load(reload(base), tmp_path / "adapter")), expected, atol=1e-5, rtol=0)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(reload(tmp_path / "merged")(IDS).logits, expected, atol=1e-5, rtol=0)


def test_a_base_without_that_bias_is_not_merged_on_disk(tmp_path: Path):
    base = save_base(tiny_llama(), tmp_path / "base")
    model = lowrank.wrap(reload(base), LoraConfig(r=4, lora_bias=True, target_modules=["q_proj"]))
    randomise(model)
    lowrank.save(model, tmp_path / "adapter")
    with pytest.raises(InputError, match="q_proj cannot be merged: lora_bias trained a bias, and it has none"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")


def tiny_siglip(folder: Path) -> transformers.PreTrainedModel:
    """A vision tower beside a text tower; its pooling head is torch's attention."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": VOCAB, "projection_size": 16, "max_position_embeddings": 16}
    config = transformers.SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8})
    model = transformers.SiglipModel(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_torchs_attention_is_merged_on_disk(bias, tmp_path: Path):
    model = tiny_siglip(tmp_path / "base")
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "input_ids": IDS}
    targets = ["head.attention", "q_proj", "patch_embedding"]
    config = peft.LoraConfig(r=2, bias=bias, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    randomise(theirs)
    expected = theirs(**inputs).image_embeds
    theirs.save_pretrained(tmp_path / "adapter")
    fresh = transformers.SiglipModel.from_pretrained(tmp_path / "base")
    loaded = lowrank.load(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**inputs).image_embeds, expected, atol=1e-5, rtol=0)
    lowrank.save(loaded, tmp_path / "again")
    merge_checkpoint(tmp_path / "base", tmp_path / "again", tmp_path / "merged")
    merged = transformers.SiglipModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(**inputs).image_embeds, expected, atol=1e-5, rtol=0)
    assert set(summarise(tmp_path / "again").ranks) == {2}
    with pytest.raises(InputError, match="more than a low-rank sum"):
        lowrank.compose([tmp_path / "again"], out=tmp_path / "composed")


def tiny_t5() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCAB, **sizes)).eval()


def seq2seq_logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS.flip(1)).logits


@pytest.mark.parametrize("doubled", [False, True], ids=["once", "doubled"])
def test_tokens_of_an_encoder_decoder_are_merged_on_disk(doubled: bool, tmp_path: Path):
    tiny_t5().save_pretrained(tmp_path / "base")
    if doubled:  # as the files of T5 on the hub
        file = tmp_path / "base" / "model.safetensors"
        tensors = load_file(file)
        tensors |= {f"{side}.embed_tokens.weight": tensors["shared.weight"].clone() for side in ("encoder", "decoder")}
        save_file(tensors, file, {"format": "pt"})
    config = peft.LoraConfig(r=2, target_modules=["q"], trainable_token_indices=[9, 40], task_type="SEQ_2_SEQ_LM")
    theirs = peft.get_peft_model(tiny_t5(), config).eval()
    randomise(theirs)
    expected = seq2seq_logits(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(seq2seq_logits(merged), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "indices", [{"lm_head": [9, 40]}, {"embed_tokens": [7], "lm_head": [9, 40]}, {"embed_tokens": [9], "lm_head": [9]}]
)
def test_tokens_of_a_head_are_merged_on_disk(indices, tied, tmp_path: Path):
    base = save_base(tiny_llama(tie_word_embeddings=tied), tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    expected = peft_adapter(base, tmp_path / "adapter", config)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(reload(tmp_path / "merged")), expected, atol=1e-5, rtol=0)


def test_tokens_of_one_side_alone_are_not_merged_on_disk(tmp_path: Path):
    tiny_t5().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q"], trainable_token_indices={"encoder.embed_tokens": [9]})
    lowrank.save(lowrank.wrap(tiny_t5(), config), tmp_path / "adapter")
    with pytest.raises(
        InputError, match=r"cannot be merged: its weight is that of decoder.embed_tokens, lm_head, shared"
    ):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize(
    ("make", "targets"), [(tiny_qwen2, ["q_proj.weight", "embed_tokens.weight"]), (tiny_gpt2, ["c_attn.weight"])]
)
def test_parameters_of_layers_are_merged_on_disk(make, targets, tmp_path: Path):
    base = save_base(make(), tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=targets, init_lora_weights=False)
    expected = peft_adapter(base, tmp_path / "adapter", config)
    torch.testing.assert_close(logits(lowrank.load(reload(base), tmp_path / "adapter")), expected, atol=1e-5, rtol=0)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(reload(tmp_path / "merged")), expected, atol=1e-5, rtol=0)
    assert summarise(tmp_path / "adapter").ranks.keys() == {4}
