"""A vocabulary that was resized in training: its rows come with the adapter, load, and merge; or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tiny import VOCAB, tiny_gpt2, tiny_llama
from weight_helpers import randomise, reload

import lowrank
from lowrank import LoraConfig
from lowrank.errors import InputError
from lowrank.storage.tensorfile import open_tensors
from lowrank.weights import merge_checkpoint

CONFIGS = {
    "layers": {"target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding's direction": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 300, 305]},
}
GROWN, SHRUNK, PADDED = VOCAB + 3, VOCAB - 10, VOCAB + 64
BODY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
IDS = torch.tensor([[3, 97, 300, 5, 99, 305, 309]])
# peft does not save what of a resized base it did not adapt; the mean of the known rows is what a resize starts from.
NEAR = 1e-2


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def adapted(library: str, base: Path, rows: int, fields: dict, folder: Path) -> torch.nn.Module:
    model = reload(base)
    model.resize_token_embeddings(rows)
    if library == "peft":
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **fields))
        randomise(wrapped)
        wrapped.save_pretrained(folder)
        return wrapped
    lowrank.wrap(model, LoraConfig(r=2, **fields))
    randomise(model)
    lowrank.save(model, folder)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("library", ["peft", "lowrank"])
@pytest.mark.parametrize(
    ("rows", "what"),
    [*((GROWN, what) for what in CONFIGS), (SHRUNK, "whole embedding"), (SHRUNK, "embedding"), (PADDED, "tokens")],
)
def test_loads_and_merges(rows: int, what: str, library: str, tied: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_llama(tie_word_embeddings=tied, num_hidden_layers=1).save_pretrained(base)
    trained = adapted(library, base, rows, CONFIGS[what], tmp_path / "adapter")
    ids = torch.cat([IDS.clamp(max=rows - 1), torch.tensor([[rows - 1, rows - 2]])], dim=1)
    wanted = logits(trained, ids)
    lost = library == "peft" and what in ("embedding", "embedding's direction", "head") and not tied
    atol = NEAR if lost else 2e-5

    fresh = reload(base)
    fresh.resize_token_embeddings(rows)  # new rows are drawn anew
    torch.testing.assert_close(logits(lowrank.load(fresh, tmp_path / "adapter"), ids), wanted, atol=atol, rtol=0)

    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    result = reload(tmp_path / "merged")
    assert result.config.vocab_size == rows
    torch.testing.assert_close(logits(result, ids), wanted, atol=atol, rtol=0)
    assert any("rows of the new tokens" in note for note in report.notes) == (lost and rows > VOCAB)

    with pytest.raises(InputError, match=rf"resize_token_embeddings\({rows}\)|\[{rows}, 32\] \(here \[{VOCAB}, 32\]\)"):
        lowrank.load(reload(base), tmp_path / "adapter")


def test_rows_that_were_given_values_come_along_from_a_model_that_was_never_on_disk(tmp_path: Path) -> None:
    def built() -> torch.nn.Module:
        model = tiny_llama(num_hidden_layers=1)
        torch.seed()
        model.resize_token_embeddings(GROWN)
        return model

    model, other = built(), built()
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCAB:] = model.model.embed_tokens.weight[5:8]
        model.lm_head.weight[VOCAB:] = 1.0
    lowrank.wrap(model, LoraConfig(target_modules=["q_proj"]))
    lowrank.save(model, tmp_path / "adapter")
    assert not torch.allclose(logits(model, IDS[:, :1]), logits(other, IDS[:, :1]), atol=0.1)
    lowrank.load(other, tmp_path / "adapter")
    torch.testing.assert_close(logits(other, IDS), logits(model, IDS), atol=1e-5, rtol=0)


def test_a_resize_after_wrapping_is_seen(tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    model = lowrank.wrap(reload(tmp_path / "base"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.resize_token_embeddings(GROWN)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = 1.0
    wanted = logits(model, IDS)
    lowrank.save(model, tmp_path / "adapter")
    merge_checkpoint(None, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(reload(tmp_path / "merged"), IDS), wanted, atol=2e-5, rtol=0)


def test_what_was_not_resized_is_not_saved(tmp_path: Path) -> None:
    for name, model in {"llama": tiny_llama(), "gpt2": tiny_gpt2()}.items():
        model.save_pretrained(tmp_path / name)
        for source in (model, reload(tmp_path / name)):
            lowrank.wrap(source, LoraConfig())
            adapter = lowrank.save(source, tmp_path / f"{name} adapter", overwrite=True)
            assert all("lora" in tensor for tensor in open_tensors(adapter / "adapter_model.safetensors").entries)


def test_a_base_with_other_known_rows_is_another_base(tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    adapted("peft", tmp_path / "base", GROWN, CONFIGS["embedding"], tmp_path / "adapter")
    other = reload(tmp_path / "base")
    other.resize_token_embeddings(GROWN)
    before = other.model.embed_tokens.weight.data.mul_(1.01).clone()
    with pytest.raises(InputError, match=r"another base: model.embed_tokens.base_layer.weight differs in 322 of 323"):
        lowrank.load(other, tmp_path / "adapter")
    assert torch.equal(other.model.embed_tokens.weight, before)


def test_rows_that_another_adapter_acts_over_stay(tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    for name in "ab":
        adapted("lowrank", tmp_path / "base", GROWN, CONFIGS["layers"], tmp_path / name)
    model = reload(tmp_path / "base")
    model.resize_token_embeddings(GROWN)
    lowrank.load(model, tmp_path / "a", "a")
    with pytest.raises(InputError, match="other adapters"):
        lowrank.load(model, tmp_path / "b", "b")


def test_a_load_that_fails_leaves_the_rows_alone(tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    adapted("lowrank", tmp_path / "base", GROWN, CONFIGS["layers"], tmp_path / "adapter")
    model = reload(tmp_path / "base")
    model.resize_token_embeddings(GROWN)
    before = model.lm_head.weight.clone()
    del model.model.layers[0].self_attn.q_proj
    with pytest.raises(InputError):
        lowrank.load(model, tmp_path / "adapter")
    assert torch.equal(model.lm_head.weight, before)


def test_a_head_with_a_bias_keeps_it(tmp_path: Path) -> None:
    config = transformers.PhiConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.PhiForCausalLM(config).save_pretrained(tmp_path / "base")
    model = reload(tmp_path / "base")
    model.resize_token_embeddings(100)
    with torch.no_grad():
        model.lm_head.bias[96:] = 3.0
    lowrank.wrap(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lowrank.save(model, tmp_path / "adapter")
    ids = torch.tensor([[3, 98, 99]])
    wanted = logits(model, ids)
    merge_checkpoint(None, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(reload(tmp_path / "merged"), ids), wanted, atol=2e-5, rtol=0)
    fresh = reload(tmp_path / "base")
    fresh.resize_token_embeddings(100)
    torch.testing.assert_close(logits(lowrank.load(fresh, tmp_path / "adapter"), ids), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "model",
    [
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4)),
        lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=96, **BODY)),
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=96, **BODY)),
    ],
    ids=["gpt2", "neox", "bert"],
)
def test_models_whose_parts_do_not_note_their_vocabulary(
    model: Callable[[], transformers.PreTrainedModel], tmp_path: Path
) -> None:
    def built() -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        made = model()
        made.resize_token_embeddings(100)
        return made.eval()

    trained, fresh = built(), built()
    with torch.no_grad():
        trained.get_input_embeddings().weight[96:] = torch.randn(4, 32)
    lowrank.wrap(trained, LoraConfig())
    lowrank.save(trained, tmp_path / "adapter")
    ids = torch.tensor([[3, 97, 98]])
    assert not torch.allclose(logits(trained, ids), logits(fresh, ids), atol=0.01)
    lowrank.load(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh, ids), logits(trained, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("what", ["embedding", "head", "whole embedding", "whole head"])
def test_an_adapter_that_a_resize_has_cut_off_is_not_saved(what: str, tmp_path: Path) -> None:
    model = lowrank.wrap(tiny_llama(num_hidden_layers=1), LoraConfig(r=2, **CONFIGS[what]))
    model.resize_token_embeddings(GROWN)
    with pytest.raises(InputError, match=r"lm_head was replaced|(embed_tokens|lm_head) has another size"):
        lowrank.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_layer_that_was_replaced_is_missed(tmp_path: Path) -> None:
    model = lowrank.wrap(tiny_llama(num_hidden_layers=1), LoraConfig(r=2))
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj was replaced"):
        lowrank.save(model, tmp_path / "adapter")


def test_answers_are_compared_in_the_new_size(tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    adapted("lowrank", tmp_path / "base", GROWN, CONFIGS["tokens"], tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", verify="answers")
    assert report.verified is not None


@pytest.mark.parametrize("rows", [VOCAB, GROWN], ids=["as it was", "grown"])
@pytest.mark.parametrize(
    ("kind", "head"),
    [("Roberta", "lm_head"), ("Bert", "cls"), ("Bert", "predictions")],
)
def test_a_whole_block_around_the_tied_head_is_the_trained_one(kind: str, head: str, rows: int, tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(**BODY, vocab_size=VOCAB, max_position_embeddings=32)
    whole = getattr(transformers, f"{kind}ForMaskedLM")
    whole(config).save_pretrained(tmp_path / "base")

    def resized() -> transformers.PreTrainedModel:
        model = whole.from_pretrained(tmp_path / "base")
        if rows != VOCAB:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    model = lowrank.wrap(resized(), LoraConfig(target_modules=["query"], modules_to_save=[head]))
    randomise(model)
    ids = IDS % VOCAB
    wanted = logits(model, ids)
    lowrank.save(model, tmp_path / "a")

    live = lowrank.load(resized(), tmp_path / "a")
    torch.testing.assert_close(logits(live, ids), wanted)
    if rows == VOCAB:  # peft leaves the rows of the embedding that a resize made as they are
        torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(resized(), tmp_path / "a"), ids), wanted)
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    torch.testing.assert_close(logits(whole.from_pretrained(tmp_path / "merged"), ids), wanted)
