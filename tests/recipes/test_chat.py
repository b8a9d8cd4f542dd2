"""`lowrank chat`: answers as `generate` gives them, to one question, to several, in a conversation."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

import lowrank
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
