"""Merging adapters that hold embeddings of new tokens: the merged model has them, or the merge is refused."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import VOCAB, tiny_llama, tiny_tokenizer
from weight_helpers import logits, randomise, reload, save_base

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError
from lowrank.storage.tensorfile import open_tensors
from lowrank.weights import merge_checkpoint


def merged(base: Path, adapter: Path) -> transformers.PreTrainedModel:
    merge_checkpoint(base, adapter, adapter.parent / "merged")
    return reload(adapter.parent / "merged")


def test_new_tokens(tmp_path: Path) -> None:
    """peft saves a resized embedding whole; the merged model has its size, and the adapter's tokenizer."""
    base = save_base(tiny_llama(tie_word_embeddings=True), tmp_path / "base")
    model = reload(base)
    model.resize_token_embeddings(VOCAB + 3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    result = merged(base, tmp_path / "adapter")
    assert result.config.vocab_size == VOCAB + 3
    assert result.lm_head.weight is result.model.embed_tokens.weight
    torch.testing.assert_close(logits(result), logits(wrapped), atol=2e-5, rtol=0)
    assert "<new>" in transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_whose_embeddings_were_trained(tied: bool, tmp_path: Path) -> None:
    """The adapter's file names a larger vocabulary than the base has, and holds every row of it."""
    base = save_base(tiny_llama(tie_word_embeddings=tied), tmp_path / "base")
    model = reload(base)
    model.resize_token_embeddings(VOCAB + 3)
    lowrank.wrap(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    randomise(model)
    adapter, wanted = lowrank.save(model, tmp_path / "adapter"), logits(model)
    result = merged(base, adapter)
    assert result.config.vocab_size == VOCAB + 3
    torch.testing.assert_close(logits(result), wanted, atol=2e-5, rtol=0)


def test_new_tokens_without_rows_are_refused(tmp_path: Path) -> None:
    """Files that were written before a resized base's rows came with them."""
    base = save_base(tiny_llama(), tmp_path / "base")
    model = reload(base)
    model.resize_token_embeddings(VOCAB + 3)
    lowrank.wrap(model, LoraConfig(target_modules=["q_proj"]))
    weights = lowrank.save(model, tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(weights).items() if "lora" in name}
    save_file(tensors, weights, open_tensors(weights).metadata)
    with pytest.raises(InputError, match=r"vocab_size 323 \(here 320\)"):
        merged(base, tmp_path / "adapter")
    assert not (tmp_path / "merged").exists()
