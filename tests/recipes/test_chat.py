"""`lowrank chat`: answers as `generate` gives them, to one question, to several, in a conversation."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

import lowrank
from lowrank.cli.chat import lines_of
from lowrank.errors import InputError
from lowrank.recipes import chat as recipe
from lowrank.recipes.chat import chat, open_model

QUESTIONS = ["Who?", "What is it?", "a"]


def expected(model, tokenizer, messages: list[dict[str, str]]) -> str:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    ends = [model.config.eos_token_id, tokenizer.eos_token_id]
    with torch.no_grad():
        output = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=0)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture
def saved(tmp_path):
    """(model and tokenizer with an adapter that changes what it says, the base's folder, the adapter's folder)"""
    tiny_llama(initializer_range=0.2).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = open_model(str(tmp_path / "base"))
    model = lowrank.wrap(model, lowrank.LoraConfig(r=4, init_lora_weights="gaussian"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    lowrank.save(model, tmp_path / "adapter")
    return model.eval(), tokenizer, tmp_path / "base", tmp_path / "adapter"


def test_one_and_several_questions(saved, capsys):
    model, tokenizer, base, adapter = saved
    wanted = [
        expected(model, tokenizer, [{"role": "system", "content": "S"}, {"role": "user", "content": text}])
        for text in QUESTIONS
    ]
    assert chat(str(adapter), prompts=QUESTIONS, system="S", max_new_tokens=6) == wanted
    assert [line for line in capsys.readouterr().out.splitlines() if line in QUESTIONS] == QUESTIONS
    assert [chat(str(adapter), prompts=[text], system="S", max_new_tokens=6)[0] for text in QUESTIONS] == wanted
    assert chat(str(base), prompts=QUESTIONS, system="S", max_new_tokens=6) != wanted


def test_a_conversation_remembers(saved, monkeypatch):
    model, tokenizer, _, adapter = saved
    said, given = iter([*QUESTIONS, ""]), []
    monkeypatch.setattr(recipe, "_asked", lambda console: next(said))
    answer = recipe.answer
    monkeypatch.setattr(recipe, "answer", lambda *a: given.append((list(a[2]), answer(*a))) or given[-1][1])
    assert chat(str(adapter), max_new_tokens=6) == []
    for number, (messages, text) in enumerate(given):
        assert [m["content"] for m in messages if m["role"] == "user"] == QUESTIONS[: number + 1]
        assert [m["content"] for m in messages if m["role"] == "assistant"] == [text for _, text in given[:number]]
        assert text == expected(model, tokenizer, messages)


def test_a_tokenizer_without_a_template_is_refused(saved, tmp_path):
    model, _, _, _ = saved
    lowrank.unwrap(model).save_pretrained(tmp_path / "mute")
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "mute")
    with pytest.raises(InputError, match="no chat template"):
        chat(str(tmp_path / "mute"), prompts=["Hello?"])


SAID = ":smile: [bold]no[/bold]\ttab  two spaces " + "long " * 60 + "\n    indented\n"


def test_answers_are_printed_as_they_are(saved, capsys, monkeypatch):
    _, _, _, adapter = saved
    monkeypatch.setattr(recipe, "answer_all", lambda model, tokenizer, prompts, **_: [SAID for _ in prompts])
    questions = [":rocket: [red]one[/red]\tx", "two " * 60]
    assert chat(str(adapter), prompts=questions) == [SAID, SAID]
    assert capsys.readouterr().out == "".join(f"{question}\n{SAID}\n" for question in questions)


def test_one_answer_is_printed_as_it_is(saved, capsys):
    _, _, _, adapter = saved
    (said,) = chat(str(adapter), prompts=["Who?"], max_new_tokens=6)
    assert capsys.readouterr().out == f"{said}\n"


def test_the_base_alone_is_asked_as_its_adapter_is(saved, tmp_path):
    model, tokenizer, base, adapter = saved
    template = tokenizer.chat_template.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n!{% endif")
    tiny_tokenizer(chat_template=template).save_pretrained(adapter)
    with_adapter = chat(str(adapter), prompts=["Who?"], max_new_tokens=6)
    alone = chat(str(adapter), prompts=["Who?"], max_new_tokens=6, use_adapter=False)
    assert alone != with_adapter
    assert alone != chat(str(base), prompts=["Who?"], max_new_tokens=6)
    with lowrank.disabled(model):
        ids = tokenizer("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n!", return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=[2, 4])
    assert alone == [tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)]


def test_another_place_of_the_base(saved, tmp_path):
    _, _, base, adapter = saved
    wanted = chat(str(adapter), prompts=["Who?"], max_new_tokens=6)
    base.rename(tmp_path / "moved")
    with pytest.raises(InputError):
        chat(str(adapter), prompts=["Who?"])
    assert chat(str(adapter), prompts=["Who?"], max_new_tokens=6, base=str(tmp_path / "moved")) == wanted
    with pytest.raises(InputError, match="no adapter's folder"):
        chat(str(tmp_path / "moved"), prompts=["Who?"], base=str(base))


@pytest.mark.parametrize("prompts", [["Hi"], ["Hi", "Ho"], []])
def test_a_system_message_that_the_template_refuses(saved, tmp_path, prompts):
    _, tokenizer, base, _ = saved
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tiny_tokenizer(chat_template=refusing + tokenizer.chat_template).save_pretrained(base)
    with pytest.raises(InputError, match="refuses the conversation: no system role"):
        chat(str(base), prompts=prompts, system="Be brief.")


def test_code_of_a_model_runs_where_it_is_trusted(saved):
    """A configuration class that the folder brings along."""
    _, _, base, _ = saved
    (base / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="--trust-remote-code"):
        chat(str(base), prompts=["Hi"])
    assert chat(str(base), prompts=["Hi"], max_new_tokens=2, trust_remote_code=True)


class TestFilesOfPrompts:
    def test_only_a_line_feed_ends_a_prompt(self, tmp_path):
        file = tmp_path / "prompts.txt"
        file.write_bytes("\ufeffone\u2028two\n\n\x0cthree\x0b\x85four\r\n  five\tsix".encode())
        assert lines_of(file) == ["one\u2028two", "\x0cthree\x0b\x85four", "  five\tsix"]

    def test_another_encoding_is_refused_with_its_line(self, tmp_path):
        file = tmp_path / "prompts.txt"
        file.write_bytes("one\ntwo\né".encode("latin-1"))
        with pytest.raises(InputError, match=r"prompts.txt, line 3: the byte 0xe9 is not UTF-8"):
            lines_of(file)

    def test_a_file_without_a_prompt_is_refused(self, tmp_path):
        file = tmp_path / "prompts.txt"
        file.write_text("\n  \n")
        with pytest.raises(InputError, match="there is no prompt in it"):
            lines_of(file)


def test_a_conversation_remembers_what_harmony_says_in_the_end(saved):
    _, tokenizer, _, _ = saved
    tokenizer.chat_template = "<|channel|>" + tokenizer.chat_template
    assert recipe.remembered(tokenizer, "analysisHm, final?assistantfinalYes. final") == "Yes. final"
    assert recipe.remembered(tokenizer, "finalYes.") == "Yes."
    tokenizer.chat_template = "plain"
    assert recipe.remembered(tokenizer, "finalYes.") == "finalYes."


class TestRoom:
    """What a model has no position or no embedding for is told, before and while it answers."""

    @pytest.mark.parametrize("prompts", [["x"], ["x", "yz"]])
    def test_answers_end_where_positions_end(self, tmp_path, prompts):
        tiny_gpt2(n_positions=32, n_layer=1).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        assert len(chat(str(tmp_path), prompts=prompts, max_new_tokens=500)) == len(prompts)
        with pytest.raises(InputError, match=r"the prompt has \d+ tokens, and the model has only 32 positions"):
            chat(str(tmp_path), prompts=[*prompts, "x" * 40])

    def test_tokens_that_the_embedding_lacks(self, tmp_path):
        tiny_llama(vocab_size=100).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        with pytest.raises(InputError, match="the model's embedding has only 100 rows"):
            chat(str(tmp_path), prompts=["hi"])
