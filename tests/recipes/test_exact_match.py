"""A model that knows its rows by heart answers all of them rightly, under every family's template."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from tiny import build

from lowrank.config import RunConfig
from lowrank.data import Examples, end_tokens, load_examples, questions_of
from lowrank.errors import InputError
from lowrank.recipes.parts.assess import assess
from lowrank.recipes.parts.batches import evaluation_plan
from lowrank.recipes.parts.exam import exam_of
from lowrank.training.evaluation.comparisons import same_json
from lowrank.training.losses.supervised import supervised_loss
from lowrank.weights.files.notes import stop_at

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from data_families import TOOLS, byte_level

found = importlib.util.find_spec("trl")
TEMPLATES = Path(found.submodule_search_locations[0]) / "chat_templates" if found else Path("none")
MARKERS = re.compile(r"<\|[a-zA-Z_0-9]+\|>|<[a-z]+_of_[a-z]+>|<｜[^｜]+｜>|\[gMASK\]|<sop>")
pytestmark = pytest.mark.skipif(not TEMPLATES.exists(), reason="this version of TRL has no chat templates")


def user(content):
    return {"role": "user", "content": content}


def answer(content=None, **more):
    return {"role": "assistant", **({} if content is None else {"content": content}), **more}


CALL = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "sunny"}
SAID = {
    "plain": [{"messages": [user("So"), answer("  No,\n\tI am not.")]}],
    "two turns": [{"messages": [user("Hi"), answer("Yes."), user("So"), answer("No.")]}],
    "thought": [{"messages": [user("Hi"), answer("Yes.", reasoning_content="It is.")]}],
    "json": [{"messages": [user("Hi"), answer('{"a": 1}')]}],
    "call": [{"messages": [user("Hi"), answer(tool_calls=[CALL])], "tools": TOOLS}],
    "after a call": [{"messages": [user("Hi"), answer(tool_calls=[CALL]), RESULT, answer("Sunny.")], "tools": TOOLS}],
}
LEARNED = [
    *[("qwen3", said) for said in ("two turns", "thought", "call", "json")],
    *[("gptoss", said) for said in ("two turns", "after a call", "json")],
    *[("deepseek_r1_distill", said) for said in ("plain", "thought")],
    *[("glm4moe", said) for said in ("plain", "call")],
    *[("qwen3_5_think", "plain"), ("nemotron_3_nano", "plain"), ("nemotron_3_nano", "thought")],
    *[("llama3_2", "plain"), ("phi3", "two turns"), ("gemma3", "plain")],
]


def tokenizer_of(name):
    template = (TEMPLATES / f"{name}.jinja").read_text()
    tokenizer = copy.copy(byte_level(tuple(sorted(set(MARKERS.findall(template)))), "<s>", "</s>"))
    tokenizer.chat_template = template
    return tokenizer


def knowing(examples: Examples, vocabulary: int):
    """A model that has learned the examples by heart."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        total = 0.0
        for ids, mask in map(examples.arrays, range(len(examples))):
            tokens = torch.from_numpy(ids.astype("int64"))
            labels = torch.where(torch.from_numpy(mask.copy()), tokens, -100)
            loss = model(input_ids=tokens[None], labels=labels[None]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        if total < 0.01 * len(examples):
            break
    return model


@contextmanager
def quiet(what, count):
    yield lambda done: None


def score(examples, tokenizer, model, match="text"):
    sections = {
        "model": {"name_or_path": "x"},
        "data": {"train": "x", "eval": "x", "packing": False, "train_on": examples.train_on},
        "training": {
            "output_dir": "x",
            "predict_with_generate": True,
            "generation_max_new_tokens": 100,
            "exact_match": match,
        },
    }
    stop_at(model, tokenizer, end_tokens(examples, tokenizer))
    config = RunConfig(**sections)
    exam = exam_of(examples, tokenizer, config.data, config.training, None)
    held_out = evaluation_plan(config.data, config.training, examples, tokenizer)
    return assess(model, tokenizer, held_out, supervised_loss(model), quiet, exam)


@pytest.mark.parametrize(("name", "said"), LEARNED)
def test_what_is_known_by_heart_is_right(name, said):
    tokenizer = tokenizer_of(name)
    examples = load_examples(copy.deepcopy(SAID[said]), tokenizer, max_length=2000)
    model = knowing(examples, len(tokenizer))
    result = score(examples, tokenizer, model, match="json" if said == "json" else "text")
    assert result.loss < 0.05
    assert result.exact_match == 1.0, result.samples
    assert len(result.samples) == len(SAID[said])  # a row that the template splits is answered once
    assert all(sample.expected.strip() for sample in result.samples)
    assert [sample.loss for sample in result.samples] == pytest.approx([result.loss])  # there is one row


def test_a_row_that_is_cut_is_asked_for_whole():
    tokenizer = tokenizer_of("qwen2_5")
    row = {"messages": [user("Hi"), answer("word " * 50)]}
    (whole,) = load_examples([row], tokenizer, max_length=1000)
    cut = load_examples([row], tokenizer, max_length=90, too_long="truncate")
    (question,) = questions_of(cut, tokenizer)
    assert question.prompt + question.answer == whole.input_ids[: len(question.prompt + question.answer)]
    assert tokenizer.decode(question.answer) == "word " * 50 + "<|im_end|>"


@pytest.mark.parametrize("train_on", ["all", "last_assistant", "completion", "assistant"])
def test_the_last_turn_is_what_is_asked(train_on):
    tokenizer = tokenizer_of("qwen2_5")
    row = {"messages": [user("Hi"), answer("Yes."), user("So"), answer("No.")]}
    (question,) = questions_of(load_examples([row], tokenizer, max_length=1000, train_on=train_on), tokenizer)
    assert tokenizer.decode(question.answer) == "No.<|im_end|>"
    assert tokenizer.decode(question.prompt).endswith("So<|im_end|>\n<|im_start|>assistant\n")


def test_of_marked_turns_the_last_that_is_trained_is_asked():
    tokenizer = tokenizer_of("qwen2_5")
    row = {"messages": [user("Hi"), answer("Yes."), user("So"), answer("No.", train=False)]}
    (question,) = questions_of(load_examples([row], tokenizer, max_length=1000), tokenizer)
    assert tokenizer.decode(question.answer) == "Yes.<|im_end|>"


def test_rows_that_teach_no_answer_ask_nothing():
    tokenizer = tokenizer_of("qwen2_5")
    asked = {"messages": [user("Hi"), answer("Yes.")]}
    marked = {"messages": [user("So"), answer("No.", train=False)]}
    alone = {"messages": [user("I only talk to myself.")]}
    examples = load_examples([marked, asked, alone], tokenizer, max_length=1000, train_on="all")
    assert len(examples) == 3
    assert [tokenizer.decode(each.answer) for each in questions_of(examples, tokenizer)] == ["Yes.<|im_end|>"]
    silent = load_examples([marked], tokenizer, max_length=1000, train_on="all")
    with pytest.raises(InputError, match="no row has an answer of an assistant that carries loss"):
        questions_of(silent, tokenizer)


def test_json_is_compared_behind_the_thought():
    assert same_json('<think>\nHm {"a": 2}\n</think>\n\n{"a": 1}', '<think>\n\n</think>\n\n{"a": 1.0}')
    assert same_json('Hm.\n</think>\n\n{"a": 1}', '\n</think>\n\n{ "a": 1 }')
    assert same_json('analysisLet me see.assistantfinal{"a": 1}', 'final{"a": 1}')
    assert not same_json('<think>\n{"a": 1}\n</think>\n\n{"a": 2}', '{"a": 1}')
    assert not same_json('<think>\n{"a": 1}', '{"a": 1}')
