"""Single tokens (`trainable_token_indices`) against peft: encoder-decoders, heads, ties, any model with an embedding."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as t
from tiny import tiny_gemma2, tiny_llama
from torch import nn

import lowrank
from lowrank import LoraConfig
from lowrank.adapters import adapter_tensors
from lowrank.errors import InputError

PREFIX = "base_model.model."
IDS = torch.arange(1, 13).view(2, 6)
SMALL = {"vocab_size": 40, "d_model": 8, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}


def t5(**fields: object) -> nn.Module:
    torch.manual_seed(0)
    config = t.T5Config(**SMALL, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0, **fields)
    return t.T5ForConditionalGeneration(config).eval()


def bart(**fields: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
             {"layers": 1, "attention_heads": 2, "ffn_dim": 8}.items()}  # fmt: skip
    config = t.BartConfig(**SMALL, **sizes, max_position_embeddings=32, scale_embedding=True, **fields)
    return t.BartForConditionalGeneration(config).eval()


def outputs(model: nn.Module) -> torch.Tensor:
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS.flip(1)
    return model(**inputs).logits


CASES = {
    "t5": (t5, [3, 12, 7]),
    "t5-shared": (t5, {"shared": [3, 12]}),
    "t5-both-sides": (t5, {"embed_tokens": [3, 12]}),
    "t5-one-side": (t5, {"encoder.embed_tokens": [3, 12]}),
    "t5-head": (t5, {"lm_head": [4, 9]}),
    "t5-same": (t5, {"shared": [3, 5], "lm_head": [3, 5]}),
    "bart": (bart, [3, 12, 7]),
    "bart-one-side": (bart, {"decoder.embed_tokens": [3, 12]}),
    "llama-tied": (lambda: tiny_llama(tie_word_embeddings=True), [3, 12, 7]),
    "llama-tied-head": (lambda: tiny_llama(tie_word_embeddings=True), {"lm_head": [4, 9]}),
    "llama-tied-same": (lambda: tiny_llama(tie_word_embeddings=True), {"embed_tokens": [4, 9], "lm_head": [4, 9]}),
    "llama-tied-apart": (lambda: tiny_llama(tie_word_embeddings=True), {"embed_tokens": [4, 9], "lm_head": [5]}),
    "llama": (tiny_llama, [3, 12]),
    "llama-head": (tiny_llama, {"lm_head": [3, 12]}),
    "llama-both": (tiny_llama, {"embed_tokens": [3, 12], "lm_head": [7]}),
    "gemma2": (lambda: tiny_gemma2(tie_word_embeddings=True), [3, 12]),
}
PARTED = {"t5-both-sides", "t5-one-side", "t5-head", "bart-one-side"}


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_files_and_merged_weights_are_pefts(case, tmp_path):
    make, indices = CASES[case]
    base = make()
    targets = ["q" if case.startswith("t5") else "q_proj"]
    fields = {"r": 2, "target_modules": targets, "trainable_token_indices": indices}
    model = lowrank.wrap(copy.deepcopy(base), LoraConfig(**fields))
    for tensor in adapter_tensors(model, "default").values():
        tensor += 0.3 * torch.randn_like(tensor)
    expected = outputs(model)
    assert (expected - outputs(base)).abs().max() > 1e-3
    lowrank.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(outputs(theirs), expected, atol=1e-4, rtol=1e-4)
    for net in (theirs, model):
        (outputs(net) * torch.linspace(-1, 1, expected.numel()).view_as(expected).sin()).sum().backward()
    wanted = {n.removeprefix(PREFIX).replace(".default", ""): p.grad for n, p in theirs.named_parameters()}
    for path in [name for name in adapter_tensors(model, "default") if "token" in name]:
        rows = model.get_submodule(path.rpartition(".token_adapter")[0]).adapters["default"].rows
        torch.testing.assert_close(rows.grad, wanted[path], atol=1e-4, rtol=1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    back = lowrank.load(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(outputs(back), expected, atol=1e-4, rtol=1e-4)
    if case in PARTED:
        with pytest.raises(InputError, match="cannot be merged: its weight is that of"):
            lowrank.merge(model)
        torch.testing.assert_close(outputs(model), expected)
        return
    merged = lowrank.merge(model)
    torch.testing.assert_close(outputs(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(outputs(again), expected, atol=1e-4, rtol=1e-4)


def test_any_model_with_embeddings(tmp_path):
    torch.manual_seed(0)
    base = nn.ModuleDict({"emb": nn.Embedding(10, 4, padding_idx=2), "pos": nn.Embedding(6, 4), "fc": nn.Linear(4, 3)})

    def run(model: nn.Module) -> torch.Tensor:
        model = getattr(model, "base_model", model)
        model = getattr(model, "model", model)
        ids = torch.tensor([[0, 2, 5], [5, 9, 2]])
        return model["fc"](model["emb"](ids) + model["pos"](torch.arange(3)))

    config = LoraConfig(target_modules=None, trainable_token_indices={"emb": [5, 2], "pos": [0], "fc": [1]})
    model = lowrank.wrap(copy.deepcopy(base), config)
    for tensor in adapter_tensors(model, "default").values():
        tensor += torch.randn_like(tensor)
    expected = run(model)
    run(model).sum().backward()
    assert not model.emb.adapters["default"].rows.grad[1].any()  # torch gives the padding token no gradient
    lowrank.save(model, tmp_path / "ours")
    torch.testing.assert_close(run(lowrank.load(copy.deepcopy(base), tmp_path / "ours")), expected)
    torch.testing.assert_close(run(lowrank.merge(model)), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(InputError, match="'embed_tokens' names no embedding and no head"):
        lowrank.wrap(base, LoraConfig(target_modules=["fc"], trainable_token_indices=[1]))


def test_a_tied_row_counts_once():
    model = lowrank.wrap(t5(), LoraConfig(r=2, target_modules=["q"], trainable_token_indices=[3, 4]))
    names = lowrank.describe(model)["default"].modules
    assert {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"} <= set(names)
    assert lowrank.describe(model)["default"].parameters == 3 * 2 * (8 + 8) + 2 * 8
