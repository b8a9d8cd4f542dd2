"""Loading a base: complete or refused, and never from a pickle."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lowrank.errors import InputError
from lowrank.models import load_model, load_tokenizer, positions_of, usable_device, vocabulary_of
from lowrank.quantisers import bitsandbytes


@pytest.fixture
def folder(tmp_path):
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_weights_dtype_and_mode(folder):
    model = load_model(str(folder))
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"there is no model folder .*nowhere"):
        load_model(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_model(str(tmp_path / "empty"))


def test_pickles_are_not_read(folder):
    model = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(model, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="can run code when they are read"):
        load_model(str(folder))


def test_missing_weights_are_not_made_up(folder):
    stored = load_file(folder / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of the weights of LlamaForCausalLM: lm_head\.weight"):
        load_model(str(folder))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"\xff" * 64 + data])
def test_a_damaged_file(folder, damage):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=r"cannot be loaded"):
        load_model(str(folder))


def test_a_config_of_an_unknown_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_thing"}))
    with pytest.raises(InputError, match=r"cannot be loaded: .*no_such_thing"):
        load_model(str(folder))


def test_code_that_comes_with_a_model_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    theirs = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "theirs", "auto_map": theirs}))
    (folder / "code.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(InputError, match="brings Python code of its own"):
        load_model(str(folder))


def test_the_end_token_pads_where_there_is_no_padding_token(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder)).pad_token == "<|im_end|>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    loaded = load_tokenizer(str(folder))
    assert loaded.pad_token in loaded.added_tokens_encoder  # a special one that is there: none is added
    assert loaded.eos_token is None
    assert len(loaded) == len(tokenizer)


def test_a_tokenizer_without_any_special_token(folder):
    backend = Tokenizer(BPE(vocab={"a": 0, "b": 1}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    with pytest.raises(InputError, match="neither a padding nor an end token, nor another special one"):
        load_tokenizer(str(folder))


def test_a_folder_without_a_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"the tokenizer of .* cannot be loaded"):
        load_tokenizer(str(folder))


def test_a_quantised_base_without_bitsandbytes(folder, monkeypatch):
    monkeypatch.setattr(bitsandbytes, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs bitsandbytes"):
        load_model(str(folder), quantization={"load_in_4bit": True})


def test_evaluating_a_quantised_base_first_spoils_nothing(folder):
    """On some CPUs bitsandbytes repacks the weights in the first pass without gradients."""
    model = load_model(str(folder), quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    ids = torch.arange(3, 12)[None]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        evaluated = model(ids).logits
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model(ids).logits, evaluated)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_told_as_that(folder, name):
    (folder / name).write_bytes(POINTER)
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match=rf"{name} is a Git LFS pointer.*\nFetch it: git -C .* lfs pull"):
            load(str(folder))


def test_a_config_that_transformers_refuses(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "x"}))
    with pytest.raises(InputError, match=r"cannot be loaded: Validation error for field 'hidden_size': \w+"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[]", r"config.json holds no JSON object but a list"),
        ("config.json", "{", r"config.json is not valid JSON: Expecting"),
        ("tokenizer.json", "3", r"tokenizer.json holds no JSON object but a int"),
        ("tokenizer_config.json", "[1]", r"tokenizer_config.json holds no JSON object but a list"),
        ("generation_config.json", "", r"generation_config.json is not valid JSON"),
        ("generation_config.json", '{"eos_token_id": "x"}', r"eos_token_id is 'x' in .*generation_config.json"),
        ("config.json", '{"eos_token_id": [1, null]}', r"eos_token_id is \[1, None\] in .*config.json"),
        ("model.safetensors.index.json", "[]", r"index.json holds no JSON object but a list"),
    ],
)
def test_a_file_that_is_no_object(folder, name, content, message):
    (folder / name).write_text(content)
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match=message):
            load(str(folder))


@pytest.mark.parametrize("part", ["model", "normalizer", "pre_tokenizer", "decoder"])
def test_a_tokenizer_of_a_kind_that_is_not_known(folder, part):
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, part: {"type": "OfNextYear"}}))
    with pytest.raises(InputError, match=r"the tokenizer of .*(does not know|cannot be loaded)"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["banana", "meta", "cuda:99", "mps", "", "cpu:x"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(InputError) as raised:
        usable_device(name)
    assert f"there is no device {name!r} here" in str(raised.value)
    assert raised.value.where == "model.device"
    assert len(str(raised.value)) < 250


def test_a_device_that_is_there():
    assert usable_device("cpu").type == "cpu"


SMALL = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
GPT = {"vocab_size": 64, "n_layer": 1, "n_head": 4, "n_embd": 16, "n_positions": 32}
FEED = {"ffn_dim": 16, "max_position_embeddings": 32}
BOUNDED = {
    "gpt2": transformers.GPT2Config(**GPT),
    "openai-gpt": transformers.OpenAIGPTConfig(**GPT),
    "gpt_bigcode": transformers.GPTBigCodeConfig(**GPT),
    "gptj": transformers.GPTJConfig(**GPT, rotary_dim=4),
    "codegen": transformers.CodeGenConfig(**GPT, n_ctx=32, rotary_dim=4),
    "ctrl": transformers.CTRLConfig(**GPT, dff=16),
    "opt": transformers.OPTConfig(**SMALL, **FEED, word_embed_proj_dim=16),
    "biogpt": transformers.BioGptConfig(**SMALL, intermediate_size=16, max_position_embeddings=32),
    "mpt": transformers.MptConfig(vocab_size=64, d_model=16, n_heads=2, n_layers=1, max_seq_len=32),
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=16, max_position_embeddings=32),
    "bloom": transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2),
    "xglm": transformers.XGLMConfig(vocab_size=64, d_model=16, ffn_dim=16, num_layers=1, attention_heads=2, max_position_embeddings=32),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
def test_positions_are_those_that_a_forward_pass_takes(name):
    model = transformers.AutoModelForCausalLM.from_config(BOUNDED[name])
    positions = positions_of(model)
    model(input_ids=torch.ones(1, 32, dtype=torch.long))
    longer = torch.ones(1, 33, dtype=torch.long)
    if positions is None:
        model(input_ids=longer)
    else:
        assert positions == 32
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=longer)
    assert vocabulary_of(model) == 64
