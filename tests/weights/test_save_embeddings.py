"""`save_embedding_layers`: the base's own embedding and head in an adapter's file, on request, as peft has it."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCAB, tiny_llama
from torch import nn
from weight_helpers import logits, randomise, reload, save_base

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError
from lowrank.weights import merge_checkpoint

PREFIX = "base_model.model."
FIELDS = {
    "plain": {"target_modules": ["q_proj"]},
    "adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
}


def tables(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix(PREFIX): value for name, value in tensors.items() if len(value) >= VOCAB}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", FIELDS)
def test_on_request(case: str, tied: bool, tmp_path: Path) -> None:
    base = save_base(tiny_llama(tie_word_embeddings=tied), tmp_path / "base")
    model = lowrank.wrap(reload(base), LoraConfig(r=4, **FIELDS[case]))
    randomise(model)
    expected = logits(model)
    lowrank.save(model, tmp_path / "with", save_embedding_layers=True)
    lowrank.save(model, tmp_path / "without")
    saved = tables(tmp_path / "with")
    assert len(saved) == 1 if tied else 2
    table = reload(base).get_input_embeddings().weight
    assert any(torch.equal(value, table) for value in saved.values())
    assert not tables(tmp_path / "without")
    theirs = peft.PeftModel.from_pretrained(reload(base), tmp_path / "with").eval()
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    for folder in ("with", "theirs"):
        torch.testing.assert_close(logits(lowrank.load(reload(base), tmp_path / folder)), expected, atol=1e-5, rtol=0)
        merge_checkpoint(base, tmp_path / folder, tmp_path / f"{folder}-merged")
        torch.testing.assert_close(logits(reload(tmp_path / f"{folder}-merged")), expected, atol=1e-5, rtol=0)


def test_a_resized_vocabulary_can_be_left_out(tmp_path: Path) -> None:
    model = reload(save_base(tiny_llama(), tmp_path / "base"))
    model.resize_token_embeddings(VOCAB + 2)
    lowrank.wrap(model, LoraConfig(r=4, target_modules=["q_proj"]))
    lowrank.save(model, tmp_path / "auto")
    lowrank.save(model, tmp_path / "without", save_embedding_layers=False)
    assert tables(tmp_path / "auto").keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert not tables(tmp_path / "without")


def test_a_model_without_words_has_none_to_save(tmp_path: Path) -> None:
    model = lowrank.wrap(nn.Sequential(nn.Linear(3, 2)), LoraConfig(r=2))
    with pytest.raises(InputError, match="a Sequential does not say which its embeddings are"):
        lowrank.save(model, tmp_path / "a", save_embedding_layers=True)
