"""Merging outside of language models, and onto bases that lack the adapter's head: the folder answers as it did."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import composite_models
import peft
import pytest
import torch
import transformers as hf
from composite_models import tiny
from transformers import PreTrainedModel
from weight_helpers import randomise

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError
from lowrank.weights import merge_checkpoint

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
WORDS = {**SIZES, "vocab_size": 96, "pad_token_id": 0}
CONVOLUTIONS = {
    "conv_dim": (16,),
    "conv_stride": (4,),
    "conv_kernel": (8,),
    "num_feat_extract_layers": 1,
    "num_conv_pos_embedding_groups": 2,
    "num_conv_pos_embeddings": 4,
    "classifier_proj_size": 16,
}
SIDE = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
IDS = torch.tensor([[3, 9, 5, 2], [4, 8, 1, 7]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 256).view(2, 3, 16, 16)
SOUND = torch.linspace(-1, 1, 800).view(2, 400).sin()

Inputs = dict[str, torch.Tensor]


def vit() -> PreTrainedModel:
    return hf.ViTModel(hf.ViTConfig(**SIZES, image_size=16, patch_size=8))


def wav2vec2() -> PreTrainedModel:
    return hf.Wav2Vec2Model(hf.Wav2Vec2Config(**SIZES, **CONVOLUTIONS))


def clip() -> PreTrainedModel:
    text = {**WORDS, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = {**SIZES, "image_size": 16, "patch_size": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def whisper() -> PreTrainedModel:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    layers = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "max_source_positions": 10}
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**SIDE, **ids, **layers, vocab_size=96, max_target_positions=16)
    )


def bert() -> PreTrainedModel:
    return hf.BertModel(hf.BertConfig(**WORDS))


def masked_bert() -> PreTrainedModel:
    return hf.BertForMaskedLM(hf.BertConfig(**WORDS))


def roberta() -> PreTrainedModel:
    return hf.RobertaForMaskedLM(hf.RobertaConfig(**WORDS))


def llama() -> PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**WORDS, "pad_token_id": None}))


def resnet() -> PreTrainedModel:
    return hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"))


def answer(model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(**inputs)
    return output.logits if hasattr(output, "logits") else output[0]


@pytest.mark.parametrize(
    ("make", "inputs", "targets"),
    [
        (vit, {"pixel_values": PIXELS}, "all-linear"),
        (resnet, {"pixel_values": PIXELS}, ["convolution"]),
        (wav2vec2, {"input_values": SOUND}, "all-linear"),
        (clip, {"input_ids": IDS, "pixel_values": PIXELS}, "all-linear"),
        (whisper, {"input_features": torch.ones(2, 8, 20), "decoder_input_ids": IDS}, "all-linear"),
        (bert, {"input_ids": IDS}, "all-linear"),
        (masked_bert, {"input_ids": IDS}, ["query", "word_embeddings"]),
    ],
)
def test_models_of_any_kind(
    make: Callable[[], PreTrainedModel], inputs: Inputs, targets: str | list[str], tmp_path: Path
) -> None:
    model = tiny(make)
    model.save_pretrained(tmp_path / "base")
    before = answer(model, inputs)
    lowrank.wrap(model, LoraConfig(r=2, target_modules=targets))
    randomise(model)
    wanted = answer(model, inputs)
    lowrank.save(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answer(merged, inputs), wanted, atol=3e-5, rtol=0)
    assert not torch.allclose(before, wanted, atol=0.05)


def classified(library: str, base: Path, auto: type, labels: int, fields: dict, folder: Path) -> torch.nn.Module:
    """A classifier with a new head, trained on a base that has another one or none."""
    torch.manual_seed(5)
    model = auto.from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True)
    fields = copy.deepcopy(fields)  # peft adds to its lists
    if library == "peft":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, **fields))
        randomise(model)
        model.save_pretrained(folder)
        return model
    lowrank.wrap(model, LoraConfig(r=2, **fields))
    randomise(model)
    lowrank.save(model, folder)
    return model


SEQUENCE, TOKEN = hf.AutoModelForSequenceClassification, hf.AutoModelForTokenClassification


@pytest.mark.parametrize("library", ["peft", "lowrank"])
@pytest.mark.parametrize("labels", [1, 2, 5])
@pytest.mark.parametrize(
    ("make", "auto", "task", "target", "head"),
    [
        (llama, SEQUENCE, "SEQ_CLS", "q_proj", "score"),
        (llama, TOKEN, "TOKEN_CLS", "q_proj", "score"),
        (bert, SEQUENCE, "SEQ_CLS", "query", "classifier"),
        (roberta, SEQUENCE, "SEQ_CLS", "query", "classifier"),
        (bert, SEQUENCE, None, "query", "classifier"),
        (composite_models.qwen3_5, SEQUENCE, "SEQ_CLS", "q_proj", "score"),
        (composite_models.qwen3_5, SEQUENCE, None, "q_proj", "score"),
        (composite_models.gemma3, SEQUENCE, "SEQ_CLS", "q_proj", "score"),
    ],
)
def test_classifiers_of_any_number_of_labels(
    make: Callable[[], PreTrainedModel],
    auto: type,
    task: str | None,
    target: str,
    head: str,
    labels: int,
    library: str,
    tmp_path: Path,
) -> None:
    tiny(make).save_pretrained(tmp_path / "base")
    fields = {"task_type": task, "target_modules": [target], "modules_to_save": [head]}
    model = classified(library, tmp_path / "base", auto, labels, fields, tmp_path / "adapter")
    ids = {"input_ids": IDS[:1]}
    wanted = answer(model, ids)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = auto.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == labels
    torch.testing.assert_close(answer(merged, ids), wanted, atol=2e-5, rtol=0)


def test_a_head_in_the_place_of_another(tmp_path: Path) -> None:
    """Images: 7 classes where the checkpoint has 3, in peft's file without a task."""
    config = hf.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3)
    hf.ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    fields = {"target_modules": ["q_proj", "query"], "modules_to_save": ["classifier"]}
    auto = hf.AutoModelForImageClassification
    model = classified("peft", tmp_path / "base", auto, 7, fields, tmp_path / "adapter")
    wanted = answer(model, {"pixel_values": PIXELS})
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(
        answer(auto.from_pretrained(tmp_path / "merged"), {"pixel_values": PIXELS}), wanted, atol=2e-5, rtol=0
    )
    fresh = auto.from_pretrained(tmp_path / "base", num_labels=7, ignore_mismatched_sizes=True)
    lowrank.load(fresh, tmp_path / "adapter")  # "query" is no name here, and peft does not mind
    torch.testing.assert_close(answer(fresh, {"pixel_values": PIXELS}), wanted, atol=2e-5, rtol=0)


def test_names_of_labels_and_the_padding_token_come_along(tmp_path: Path) -> None:
    tiny(llama).save_pretrained(tmp_path / "base")
    names = {0: "bad", 1: "so so", 2: "good"}
    model = SEQUENCE.from_pretrained(
        tmp_path / "base", id2label=names, label2id={label: i for i, label in names.items()}, pad_token_id=0
    )
    lowrank.wrap(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"]))
    randomise(model)
    wanted = answer(model, {"input_ids": IDS})
    lowrank.save(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = SEQUENCE.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == names
    torch.testing.assert_close(answer(merged, {"input_ids": IDS}), wanted, atol=2e-5, rtol=0)


def test_a_part_that_nobody_saved_is_refused(tmp_path: Path) -> None:
    """The pooler of a masked language model's checkpoint is made up when a classifier is loaded out of it."""
    tiny(masked_bert).save_pretrained(tmp_path / "base")
    fields = {"task_type": "SEQ_CLS", "target_modules": ["query"], "modules_to_save": ["classifier"]}
    for library in ("peft", "lowrank"):
        classified(library, tmp_path / "base", SEQUENCE, 3, fields, tmp_path / library)
        with pytest.raises(InputError, match=r"neither base nor adapter holds bert\.pooler\.dense\.weight"):
            merge_checkpoint(tmp_path / "base", tmp_path / library, tmp_path / "merged")
    fields["modules_to_save"] = ["classifier", "pooler"]
    model = classified("lowrank", tmp_path / "base", SEQUENCE, 3, fields, tmp_path / "whole")
    merge_checkpoint(tmp_path / "base", tmp_path / "whole", tmp_path / "merged")
    merged = SEQUENCE.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answer(merged, {"input_ids": IDS}), answer(model, {"input_ids": IDS}), atol=2e-5, rtol=0)


def test_pefts_biases_beside_a_head_of_several_layers(tmp_path: Path) -> None:
    """Its file holds the head three times over."""
    tiny(roberta).save_pretrained(tmp_path / "base")
    fields = {"task_type": "SEQ_CLS", "target_modules": ["query"], "bias": "all"}
    model = classified("peft", tmp_path / "base", SEQUENCE, 3, fields, tmp_path / "adapter")
    wanted = answer(model, {"input_ids": IDS})
    fresh = SEQUENCE.from_pretrained(tmp_path / "base", num_labels=3)
    lowrank.load(fresh, tmp_path / "adapter")
    torch.testing.assert_close(answer(fresh, {"input_ids": IDS}), wanted, atol=2e-5, rtol=0)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = SEQUENCE.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answer(merged, {"input_ids": IDS}), wanted, atol=2e-5, rtol=0)


def test_an_adapter_of_the_body_leaves_the_folder_its_head(tmp_path: Path) -> None:
    tiny(llama).save_pretrained(tmp_path / "base")
    body = hf.LlamaModel.from_pretrained(tmp_path / "base")
    lowrank.wrap(body, LoraConfig(r=2))
    randomise(body)
    lowrank.save(body, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.architectures == ["LlamaForCausalLM"]
    whole = lowrank.load(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(answer(merged, {"input_ids": IDS}), answer(whole, {"input_ids": IDS}), atol=2e-5, rtol=0)


def bart() -> PreTrainedModel:
    layers = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "forced_eos_token_id": None}
    return hf.BartForConditionalGeneration(hf.BartConfig(**SIDE, **layers, vocab_size=96))


def t5() -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, vocab_size=96))


def m2m100() -> PreTrainedModel:
    layers = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    return hf.M2M100ForConditionalGeneration(hf.M2M100Config(**SIDE, **layers, vocab_size=96))


@pytest.mark.parametrize("fields", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, {}])
@pytest.mark.parametrize("make", [bart, t5, m2m100])
def test_tied_tables_of_encoder_decoders_are_merged_apart(
    make: Callable[[], PreTrainedModel], fields: dict, tmp_path: Path
) -> None:
    model, inputs = tiny(make), {"input_ids": IDS, "decoder_input_ids": IDS}
    model.save_pretrained(tmp_path / "base")
    lowrank.wrap(model, LoraConfig(r=2, **{"target_modules": ["encoder.embed_tokens"], **fields}))
    randomise(model)
    wanted = answer(model, inputs)
    lowrank.save(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answer(merged, inputs), wanted, atol=3e-5, rtol=0)
    in_memory = lowrank.merge(lowrank.load(type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter"))
    assert merged.config.tie_word_embeddings == in_memory.config.tie_word_embeddings
