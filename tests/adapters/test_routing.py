"""One adapter for each row: each row is what its adapter gives alone, or the routing is refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from tiny import VOCAB, tiny_llama
from torch import nn

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError

RANDOM = {"init_lora_weights": False}
IDS = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))
ROWS = ["a", None, "b"]
_SIZES = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
_SIZES |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
_SIZES |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48)
_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
MODELS = {
    "llama": lambda: tiny_llama(initializer_range=0.3),
    "bart": lambda: t.BartForConditionalGeneration(
        t.BartConfig(**_SIZES, bos_token_id=1, eos_token_id=2, init_std=0.3, max_position_embeddings=64)
    ),
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**_T5, decoder_start_token_id=0, pad_token_id=0)),
}


def wrapped(name: str, **fields: object) -> t.PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for adapter in "ab":
        lowrank.wrap(model, LoraConfig(r=4, lora_alpha=32, **{**RANDOM, **fields}), adapter)
    for key, parameter in model.named_parameters():
        if ".adapters." in key:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def each_alone(model: t.PreTrainedModel, run) -> list:
    found = []
    for i, row in enumerate(ROWS):
        with lowrank.disabled(model) if row is None else lowrank.using(model, row):
            found.append(run(IDS[i : i + 1]))
    return found


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 9]}],
    ids=["lora", "dora", "biases", "whole head", "tokens"],
)
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_what_each_adapter_gives_alone(name, fields):
    if name == "t5" and "bias" in fields:
        pytest.skip("T5 has no biases")
    model = wrapped(name, **fields)

    def run(ids):
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids, **more).logits

    expected = torch.cat(each_alone(model, run))
    with lowrank.routed(model, ROWS):
        torch.testing.assert_close(run(IDS), expected, atol=1e-5, rtol=1e-5)


HOW = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "beams, several answers": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("name", MODELS)
def test_generate_keeps_each_rows_adapter(name, how):
    model = wrapped(name)
    how = {**how, "max_new_tokens": 5, "min_new_tokens": 5}
    expected = torch.cat(each_alone(model, lambda ids: model.generate(ids, **how)))
    with lowrank.routed(model, ROWS):
        assert torch.equal(model.generate(IDS, **how), expected)
        assert model(input_ids=IDS, **({"decoder_input_ids": IDS} if name != "llama" else {})).logits.isfinite().all()
    lowrank.unwrap(model)
    assert "_expand_inputs_for_generation" not in model.__dict__


def test_sampled_answers_of_one_row_have_its_adapter():
    model = wrapped("llama")
    how = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 5, "min_new_tokens": 5}
    with lowrank.using(model, "a"):
        torch.manual_seed(0)
        expected = model.generate(IDS, **how)
    with lowrank.routed(model, ["a"] * 3):
        torch.manual_seed(0)
        assert torch.equal(model.generate(IDS, **how), expected)


def test_a_batch_that_is_a_multiple_of_the_rows_is_refused_outside_of_generate():
    model = wrapped("llama")
    with lowrank.routed(model, ["a", "b"]), pytest.raises(InputError, match="given 2 rows, and a Linear sees a batch"):
        model(IDS.repeat(2, 1)[:4])


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.gru = nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(self.lin(x))[0]


class Turned(nn.Module):
    """The sequence first, inside."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(
    ("make", "fields", "length", "message"),
    [
        (Gru, {"modules_to_save": ["gru"]}, 3, "a GRU takes or gives more than one tensor"),
        (Turned, {}, 3, "sees a batch of 3"),
        (Turned, {}, 2, "which of the first two dimensions holds the rows cannot be told, since Turned"),
        (lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8)), {}, 2, "since TransformerEncoderLayer may swap"),
    ],
)
def test_modules_whose_rows_are_not_the_batchs_are_refused(make, fields, length, message):
    target = "lin" if make in (Gru, Turned) else "linear1"
    model = lowrank.wrap(make(), LoraConfig(target_modules=[target], **fields, **RANDOM), "a")
    with lowrank.routed(model, ["a", None]), pytest.raises(InputError, match=message):
        model(torch.randn(2, length, 4))


def test_what_is_looked_up_by_place_and_single_experts_are_refused():
    t5 = lowrank.wrap(MODELS["t5"](), LoraConfig(target_modules=["relative_attention_bias"], **RANDOM), "a")
    with pytest.raises(InputError, match="a table that is not looked up"), lowrank.routed(t5, ["a", None]):
        pass
    config = t.SwitchTransformersConfig(**_T5, num_experts=2, num_sparse_encoder_layers=1)
    switch = t.SwitchTransformersForConditionalGeneration(config)
    experts = [path for path, m in switch.named_modules() if "expert" in path and isinstance(m, nn.Linear)]
    if experts:
        lowrank.wrap(switch, LoraConfig(target_modules=[experts[0]], **RANDOM), "a")
        with pytest.raises(InputError, match="an expert, where tokens of all rows mix"), lowrank.routed(switch, ["a"]):
            pass
