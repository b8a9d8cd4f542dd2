"""Merging in memory: whole or not at all, and the merged model answers as before, also when it is saved and read."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import transformers as t
from tiny import VOCAB, tiny_llama
from torch import nn
from torch.nn.utils import parametrizations

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError, JobError
from lowrank.models import load_model

IDS = torch.arange(3, 15).view(2, 6)
RANDOM = {"init_lora_weights": False}
_BART = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
_BART |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
_BART |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48)
_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
_BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip


def _gemma() -> t.T5GemmaModuleConfig:
    return t.T5GemmaModuleConfig(**_BERT, num_key_value_heads=2, head_dim=8)


MODELS = {
    "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**_BART)),
    "marian": lambda: t.MarianMTModel(t.MarianConfig(**_BART, pad_token_id=0)),
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**_T5)),
    "umt5": lambda: t.UMT5ForConditionalGeneration(t.UMT5Config(**_T5)),
    "switch": lambda: t.SwitchTransformersForConditionalGeneration(t.SwitchTransformersConfig(**_T5, num_experts=2)),
    "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**_BERT)),
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**_BERT)),
    "llama": lambda: tiny_llama(tie_word_embeddings=True),
    "t5gemma": lambda: t.T5GemmaForConditionalGeneration(
        t.T5GemmaConfig(encoder=_gemma(), decoder=_gemma(), vocab_size=VOCAB)
    ),
    "two berts": lambda: t.EncoderDecoderModel(
        config=t.EncoderDecoderConfig.from_encoder_decoder_configs(
            t.BertConfig(**_BERT), t.BertConfig(**_BERT, is_decoder=True, add_cross_attention=True)
        )
    ),
}


def made(name: str) -> t.PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@torch.no_grad()
def logits(model: t.PreTrainedModel) -> torch.Tensor:
    torch.manual_seed(0)
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


def shaken(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


@pytest.mark.parametrize("case", ["head", "whole head", "whole block of the head"])
@pytest.mark.parametrize("name", MODELS)
def test_a_merged_head_answers_as_before_also_when_saved(name, case, tmp_path):
    model = made(name)
    head = path_of(model, model.get_output_embeddings())
    inner = next(path for path, m in model.named_modules() if type(m) is nn.Linear and path != head)
    fields = {
        "head": {"target_modules": head.replace(".", r"\.")},
        "whole head": {"target_modules": [inner], "modules_to_save": [head]},
        "whole block of the head": {
            "target_modules": [inner],
            "modules_to_save": [head.removeprefix("decoder.").split(".")[0]],
        },
    }[case]
    base = logits(model)
    expected = logits(shaken(lowrank.wrap(model, LoraConfig(r=4, **fields, **RANDOM))))
    assert (expected - base).abs().max() > 1e-3
    merged = lowrank.merge(model)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)
    merged.tie_weights()  # as when it is resized
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    lowrank.unwrap(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_merge_that_is_not_finite_changes_nothing():
    model = tiny_llama(tie_word_embeddings=True)
    before = state(model)
    lowrank.wrap(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], trainable_token_indices=[3], **RANDOM))
    expected = logits(model)
    last = model.model.layers[1].mlp.up_proj.adapters["default"]
    kept, last.lora_A.data = last.lora_A.data, last.lora_A.data * float("nan")
    with pytest.raises(JobError, match=r"into model.layers.1.mlp.up_proj gives values that are not finite"):
        lowrank.merge(model)
    last.lora_A.data = kept
    assert torch.equal(logits(model), expected)
    check_untouched(model, before)


def test_a_sum_beyond_the_weights_dtype_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    before = state(model)
    lowrank.wrap(model, LoraConfig(target_modules=["0", "1"], **RANDOM))
    model[1].adapters["default"].lora_B.data.fill_(1e5)
    with pytest.raises(JobError, match="not finite"):
        lowrank.merge(model)
    check_untouched(model, before)


@pytest.mark.parametrize("quantization", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_a_quantised_base_stays_quantised_where_merging_fails(quantization, tmp_path, monkeypatch):
    tiny_llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="bfloat16", quantization=quantization)
    modules, before = dict(model.named_modules()), state(model)
    lowrank.wrap(model, LoraConfig(r=2, **RANDOM))
    expected = logits(model)
    layer = model.model.layers[1].mlp.down_proj.adapters["default"]
    with monkeypatch.context() as patch:  # memory ends in the middle of writing
        calls = iter(range(9))
        merge_into = type(layer).merge_into
        original = lambda self, *args: merge_into(self, *args) if self is not layer or not next(calls) else _fail()  # noqa: E731
        patch.setattr(type(layer), "merge_into", original)
        with pytest.raises(MemoryError):
            lowrank.merge(model)
    assert torch.equal(logits(model), expected)
    assert model.config.quantization_config is not None
    check_untouched(model, before)
    assert dict(model.named_modules()) == modules


def _fail() -> None:
    raise MemoryError


def test_a_torch_model_in_4_bits_merges():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)).to("cpu")
    lowrank.wrap(model, LoraConfig(target_modules=["0"], **RANDOM))
    x = torch.randn(2, 64)
    expected = model(x)
    torch.testing.assert_close(lowrank.merge(model)(x), expected, atol=1e-4, rtol=1e-4)
    assert type(model[0]) is nn.Linear


class Doubled(nn.Module):
    """A parametrisation of one's own, without an inverse."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight + 0.1


PARAMETRISED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
    "own": lambda: _with_own(nn.Linear(8, 8)),
    "convolution": lambda: parametrizations.weight_norm(nn.Conv1d(8, 8, 1)),
    "embedding": lambda: parametrizations.weight_norm(nn.Embedding(9, 8)),
}


def _with_own(module: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    return module


@pytest.mark.parametrize("make", PARAMETRISED.values(), ids=PARAMETRISED)
def test_a_parametrised_weight_merges_to_what_it_stood_for(make):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(layer=make())).eval()
    inputs = {nn.Conv1d: torch.randn(2, 8, 5), nn.Embedding: torch.arange(6)}
    x = inputs.get(type(model.layer).__bases__[0], torch.randn(2, 8))
    twin = copy.deepcopy(model)
    untouched = twin(x)
    lowrank.wrap(model, LoraConfig(target_modules=["layer"], **RANDOM))
    expected = model(x)
    assert not torch.allclose(expected, untouched, atol=1e-4)
    torch.testing.assert_close(lowrank.merge(model)(x), expected)
    assert not nn.utils.parametrize.is_parametrized(model.layer)
    assert torch.equal(twin(x), untouched)


OTHERS = {
    "wav2vec2": lambda: t.Wav2Vec2Model(
        t.Wav2Vec2Config(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, conv_dim=(16,),
            conv_stride=(4,), conv_kernel=(8,), num_feat_extract_layers=1, num_conv_pos_embedding_groups=2,
        )
    ),
    "vit": lambda: t.ViTModel(
        t.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_models_without_words_merge(name):
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    x = torch.randn(2, 400) if name == "wav2vec2" else torch.randn(2, 3, 16, 16)
    lowrank.wrap(model, LoraConfig(r=2, **RANDOM))
    expected = model(x).last_hidden_state
    torch.testing.assert_close(lowrank.merge(model)(x).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_merging_inside_of_routed_asks_for_names():
    model = lowrank.wrap(tiny_llama(), LoraConfig(r=2, **RANDOM))
    with lowrank.routed(model, ["default"]), pytest.raises(InputError, match="cannot be told inside of routed"):
        lowrank.merge(model)
