"""The loss mask, token by token, on real template families: what is supervised is what the model has to say."""

from __future__ import annotations

import json
import re
from typing import ClassVar

import pytest
from data_families import (
    CHATML,
    FAMILIES,
    GPT2_WORDS,
    HEADERS,
    IM,
    LLAMA3,
    LLAMA_WORDS,
    MISTRAL_NEMO,
    QWEN_THINKING,
    TOOLS,
    Family,
    byte_level,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lowrank.data import Examples, check_supervision, load_examples
from lowrank.data.supervision.align import Encoder
from lowrank.errors import InputError

SETTINGS = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
BY_NAME = {family.name: family for family in FAMILIES}
THINKING = Family("thinking", lambda: byte_level(IM, None, "<|im_end|>"), QWEN_THINKING, "<|im_end|>")
NEMO = Family("nemo", lambda: byte_level(("[INST]", "[/INST]"), "<s>", "</s>"), MISTRAL_NEMO, "</s>")

# Any text that begins and ends with something visible: accents, combining marks, emoji, several scripts, code.
visible = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=6)
inner = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], include_characters="\n\t"), max_size=20)
texts = st.builds(lambda a, b, c: a + b + c, visible, inner, visible)


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def chat(*contents, system=None):
    turns = [user(text) if at % 2 == 0 else answer(text) for at, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def load(messages, tokenizer, **options) -> Examples:
    row = messages if isinstance(messages, dict) else {"messages": messages}
    return load_examples([row], tokenizer, max_length=100_000, **options)


def runs(example) -> list[tuple[int, list[int]]]:
    """Runs of supervised tokens: where each starts, and its ids."""
    found, inside = [], False
    for at, (token, mark) in enumerate(zip(example.input_ids, example.supervised, strict=True)):
        if mark and not inside:
            found.append((at, []))
        if mark:
            found[-1][1].append(token)
        inside = mark
    return found


def said(examples, tokenizer) -> list[str]:
    """What every run of supervised tokens says, over all examples."""
    return [
        tokenizer.decode(ids, clean_up_tokenization_spaces=False) for example in examples for _, ids in runs(example)
    ]


def tokens_of(messages, tokenizer, **options) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@SETTINGS
@given(contents=st.lists(texts, min_size=2, max_size=6).filter(lambda some: len(some) % 2 == 0), system=texts)
def test_supervised_tokens_are_the_answers_and_their_end_tokens(family, contents, system):
    tokenizer = family.make()
    assume(not any(token in text for token in tokenizer.all_special_tokens for text in [*contents, system]))
    messages = chat(*contents)
    examples = load(messages, tokenizer)
    assert len(examples) == 1
    assert examples[0].input_ids == tokens_of(messages, tokenizer)
    expected = [family.written(text) + family.end for text in contents[1::2]]
    found = said(examples, tokenizer)
    if family.exact_decoding:
        assert found == expected
    else:
        assert [text.lstrip(" ") for text in found] == [text.lstrip(" ") for text in expected]
    check_supervision(examples, tokenizer)


@pytest.mark.parametrize("family", [*FAMILIES, THINKING, NEMO], ids=lambda family: family.name)
@SETTINGS
@given(contents=st.lists(texts, min_size=2, max_size=6).filter(lambda some: len(some) % 2 == 0), system=texts)
def test_each_turn_follows_the_very_tokens_of_its_prompt(family, contents, system):
    """The model is asked for a turn with these tokens at inference, so training must show it just these before it."""
    tokenizer = family.make()
    assume(not any(token in text for token in tokenizer.all_special_tokens for text in [*contents, system]))
    messages = chat(*contents, system=system if family.system else None)
    examples = load(messages, tokenizer)
    befores = [example.input_ids[:at] for example in examples for at, _ in runs(example)]
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    assert befores == [tokens_of(messages[:at], tokenizer, add_generation_prompt=True) for at in turns]
    ends = [ids[-1] for example in examples for _, ids in runs(example)]
    assert ends == [tokenizer.convert_tokens_to_ids(family.end)] * len(turns)


def test_the_end_token_is_supervised_although_it_is_the_padding_token():
    tokenizer = BY_NAME["chatml"].make()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = load(chat("Hi", "Hello"), tokenizer)[0]
    at = max(i for i, token in enumerate(example.input_ids) if token == tokenizer.eos_token_id)
    assert example.supervised[at]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_bos_is_never_doubled(family):
    tokenizer = family.make()
    if tokenizer.bos_token_id is None:
        pytest.skip("the tokenizer has no BOS token")
    rows = [{"messages": chat("Hi", "Hello")}, {"prompt": "2+2=", "completion": "4"}, {"text": "Once upon a time"}]
    counts = [load(row, tokenizer)[0].input_ids.count(tokenizer.bos_token_id) for row in rows]
    assert counts == [1 if "bos_token" in family.template else 0, 1, 1]
    again = load({"text": f"{tokenizer.bos_token}Once upon a time"}, tokenizer)[0]
    assert again.input_ids.count(tokenizer.bos_token_id) == 1


def test_multi_byte_characters_are_supervised_with_all_their_tokens():
    tokenizer = BY_NAME["qwen"].make()
    assert len(tokenizer("😀", add_special_tokens=False)["input_ids"]) == 4
    assert said(load(chat("日本", "😀"), tokenizer), tokenizer) == ["😀<|im_end|>"]


class TestTrainOn:
    messages = chat("One?", "First.", "Two?", "Second.", "Three?", "Third.")

    def said(self, train_on, messages=None):
        tokenizer = BY_NAME["chatml"].make()
        return said(load(messages or self.messages, tokenizer, train_on=train_on), tokenizer)

    def test_assistant(self):
        assert self.said("assistant") == ["First.<|im_end|>", "Second.<|im_end|>", "Third.<|im_end|>"]

    def test_last_assistant(self):
        assert self.said("last_assistant") == ["Third.<|im_end|>"]

    def test_completion_is_all_that_follows_the_last_question(self):
        calls = [*self.messages, answer("And more.")]
        assert self.said("completion", calls) == ["Third.<|im_end|>", "And more.<|im_end|>"]

    def test_all_but_the_first_token(self):
        tokenizer = BY_NAME["chatml"].make()
        examples = load(self.messages, tokenizer, train_on="all")
        assert examples[0].supervised == [False] + [True] * (len(examples[0].input_ids) - 1)
        check_supervision(examples, tokenizer)

    def test_a_turn_marked_train_false_is_context(self):
        marked = [dict(message) for message in self.messages]
        marked[3]["train"] = False
        assert self.said("assistant", marked) == ["First.<|im_end|>", "Third.<|im_end|>"]

    def test_a_turn_marked_train_false_is_context_under_all(self):
        marked = [dict(message) for message in self.messages]
        marked[0]["train"] = marked[3]["train"] = False
        tokenizer = BY_NAME["phi-bytes"].make()
        examples = load(marked, tokenizer, train_on="all")
        whole = tokenizer.apply_chat_template(self.messages, tokenize=False)
        expected = whole.replace("<|assistant|>\nSecond.<|end|>\n", "|").replace("<|user|>\nOne?<|end|>\n", "")
        assert "|".join(said(examples, tokenizer)) == expected
        check_supervision(load(marked[:3], tokenizer, train_on="all"), tokenizer)

    def test_train_true_on_a_question_is_refused(self):
        with pytest.raises(InputError, match='"train" asks for loss on a user message'):
            self.said("assistant", [{**user("Hi"), "train": True}, answer("Hello")])


class TestTools:
    call: ClassVar = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    result: ClassVar = {"role": "tool", "name": "get_weather", "content": "sunny"}

    def messages(self, **more):
        call = {"role": "assistant", "tool_calls": [{**self.call, **more}]}
        return [user("Weather?"), call, self.result, answer("It is sunny.")]

    def test_tool_calls_and_the_answer_after_the_result(self):
        tokenizer = BY_NAME["qwen"].make()
        examples = load({"messages": self.messages(), "tools": TOOLS}, tokenizer)
        written = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
        assert examples[0].input_ids == tokens_of(self.messages(), tokenizer, tools=TOOLS)
        first, second = said(examples, tokenizer)
        assert (first.strip(), second) == (written, "It is sunny.<|im_end|>")

    def test_arguments_and_tools_may_be_json_text(self):
        tokenizer = BY_NAME["qwen"].make()
        written = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
        rows = [
            {"messages": self.messages(), "tools": TOOLS},
            {"messages": self.messages(function=written), "tools": json.dumps(TOOLS)},
        ]
        first, second = load_examples(rows, tokenizer, max_length=1000)
        assert first == second

    def test_a_template_that_drops_tool_calls_is_refused(self):
        template = CHATML.replace("message['content']", "(message['content'] or '')")
        tokenizer = Family("drops", BY_NAME["chatml"].tokenizer, template, "<|im_end|>").make()
        with pytest.raises(InputError, match=r"leaves out part of message 2: of 'get_weather'"):
            load(self.messages(), tokenizer)

    def test_a_template_that_ignores_the_tools_is_refused(self):
        with pytest.raises(InputError, match="does not tell the model about the tool 'get_weather'"):
            load({"messages": chat("Hi", "Hello"), "tools": TOOLS}, BY_NAME["chatml"].make())


class TestRewriting:
    """Templates that write earlier turns otherwise once the conversation goes on."""

    messages: ClassVar = [
        user("One?"),
        answer("First.", reasoning_content="Let me see."),
        user("Two?"),
        answer("Second.", reasoning_content="Easy."),
    ]

    def test_each_turn_is_trained_as_it_would_be_generated(self):
        tokenizer = THINKING.make()
        examples = load(self.messages, tokenizer)
        assert said(examples, tokenizer) == [
            "<think>\nLet me see.\n</think>\n\nFirst.<|im_end|>",
            "<think>\nEasy.\n</think>\n\nSecond.<|im_end|>",
        ]
        assert "Let me see" not in tokenizer.decode(examples[1].input_ids)
        assert (examples.report.rows, examples.report.examples, examples.report.split) == (1, 2, 1)
        check_supervision(examples, tokenizer)

    def test_turns_that_a_template_does_not_change_share_an_example(self):
        tokenizer = THINKING.make()
        messages = [*self.messages, answer("Third.", reasoning_content="Hm.")]
        examples = load(messages, tokenizer)
        assert [len(runs(example)) for example in examples] == [1, 2]

    def test_reasoning_that_the_template_never_writes_is_refused(self):
        with pytest.raises(InputError, match=r"row 1: the chat template leaves out part of message 2"):
            load(self.messages, BY_NAME["chatml"].make())

    def test_reasoning_inside_the_content_that_the_template_cuts_away_is_refused(self):
        template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
        tokenizer = Family("cuts", BY_NAME["chatml"].tokenizer, template, "<|im_end|>").make()
        with pytest.raises(InputError, match=r"leaves out part of message 2"):
            load(chat("Hi", "<think>Hm</think>Hello"), tokenizer)

    def test_under_all_what_is_dropped_is_refused(self):
        with pytest.raises(InputError, match="leaves out part of message 2"):
            load(self.messages, THINKING.make(), train_on="all")

    def test_a_system_message_moved_into_the_question_that_waits_for_an_answer(self):
        tokenizer = NEMO.make()
        examples = load(chat("One?", "First.", "Two?", "Second.", system="Be brief."), tokenizer)
        assert [tokenizer.decode(example.input_ids) for example in examples] == [
            "<s>[INST]Be brief.\n\nOne?[/INST]First.</s>",
            "<s>[INST]One?[/INST]First.</s>[INST]Be brief.\n\nTwo?[/INST]Second.</s>",
        ]
        assert said(examples, tokenizer) == ["First.</s>", "Second.</s>"]

    def test_the_space_before_an_answer_stays_with_it(self):
        template = MISTRAL_NEMO.replace("message['content'] + eos_token", "' ' + message['content'] + eos_token")
        tokenizer = Family("spaced", NEMO.tokenizer, template, "</s>").make()
        examples = load(chat("One?", "First.", system="Be brief."), tokenizer)
        assert tokenizer.decode(examples[0].input_ids) == "<s>[INST]Be brief.\n\nOne?[/INST] First.</s>"
        assert said(examples, tokenizer) == [" First.</s>"]

    def test_a_prompt_that_no_turn_begins_with_is_refused_with_its_row(self):
        template = CHATML.replace("assistant\n' }}{% endif", "robot\n' }}{% endif")
        tokenizer = Family("other", BY_NAME["chatml"].tokenizer, template, "<|im_end|>").make()
        with pytest.raises(InputError, match=r"row 1: message 2 cannot be aligned.*robot"):
            load(chat("Hi", "Hello"), tokenizer)

    def test_one_turn_of_several_that_no_prompt_begins_is_left_out_of_the_loss_and_counted(self):
        once = "{{ '<|im_start|>' + ('robot' if messages | length == 3 else 'assistant') + '\n' }}{% endif %}"
        template = CHATML.replace("{{ '<|im_start|>assistant\n' }}{% endif %}", once)
        tokenizer = Family("other", BY_NAME["chatml"].tokenizer, template, "<|im_end|>").make()
        examples = load(chat("Hi", "Hello", "So?", "Yes."), tokenizer)
        assert said(examples, tokenizer) == ["Hello<|im_end|>"]
        assert examples.report.masked_turns == 1

    def test_a_turn_that_does_not_open_the_reasoning_that_it_is_asked_with_begins_behind_the_header(self):
        template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
        tokenizer = Family("thinks", BY_NAME["chatml"].tokenizer, template, "<|im_end|>").make()
        examples = load(chat("Hi", "Hello"), tokenizer)
        assert said(examples, tokenizer) == ["Hello<|im_end|>"]
        assert examples.report.unasked == 1
        examples = load(chat("Hi", "<think>\nHm.\n</think>\nHello"), tokenizer)
        assert said(examples, tokenizer) == ["Hm.\n</think>\nHello<|im_end|>"]
        assert examples.report.unasked == 0


class TestHeaders:
    """Templates without a generation prompt: the header is found by comparing two answers."""

    def make(self, template):
        return Family("x", BY_NAME["chatml"].tokenizer, template, "<|im_end|>").make()

    def test_a_template_that_ignores_add_generation_prompt(self):
        tokenizer = self.make(re.sub(r"(?s){% if add_generation_prompt.*", "", CHATML))
        assert said(load(chat("Hi", "Hello", "So?", "Yes."), tokenizer), tokenizer) == [
            "Hello<|im_end|>",
            "Yes.<|im_end|>",
        ]

    def test_a_conversation_that_begins_with_the_assistant(self):
        tokenizer = BY_NAME["chatml"].make()
        assert said(load([answer("Welcome"), user("Hi"), answer("Yes?")], tokenizer), tokenizer) == [
            "Welcome<|im_end|>",
            "Yes?<|im_end|>",
        ]


class TestRefusals:
    def test_a_turn_without_an_end_token(self):
        template = re.sub(re.escape("<|im_end|>"), "", CHATML)
        tokenizer = Family("x", BY_NAME["chatml"].tokenizer, template, "<|im_end|>").make()
        with pytest.raises(InputError, match="does not end in a supervised end token"):
            check_supervision(load(chat("Hi", "Hello"), tokenizer), tokenizer)

    def test_a_conversation_the_template_refuses(self):
        with pytest.raises(InputError, match=r"row 1: the chat template refuses.*System role not supported"):
            load(chat("Hi", "Hello", system="Be nice."), BY_NAME["gemma"].make())

    def test_no_template(self):
        tokenizer = BY_NAME["chatml"].make()
        tokenizer.chat_template = None
        with pytest.raises(InputError, match=r"no chat template\nSet data.chat_template: chatml, plain fit"):
            load(chat("Hi", "Hello"), tokenizer)

    def test_a_slow_tokenizer(self):
        class Slow:
            is_fast = False

        with pytest.raises(InputError, match="has no fast version"):
            Encoder(Slow())


def test_special_tokens_in_a_rows_own_text_are_counted():
    tokenizer = BY_NAME["chatml"].make()
    twice = tokenizer.apply_chat_template(chat("Hi", "Hello"), tokenize=False)
    rows = [{"messages": chat("Hi", "Hello")}, {"messages": chat(twice, "Hello")}]
    assert load_examples(rows, tokenizer, max_length=1000).report.control_text == 1


def test_prompts_that_are_cut_into_other_tokens_by_themselves_are_encoded_apart_and_counted():
    """With GPT-2's words, two line breaks before a letter are two tokens, at the end of a prompt one."""
    for words, uneven in ((GPT2_WORDS, 1), (LLAMA_WORDS, 0)):
        tokenizer = byte_level(HEADERS, "<s>", "<|eot_id|>", words=words)
        tokenizer.chat_template = LLAMA3
        examples = load(chat("Hi", "Hello"), tokenizer)
        assert examples.report.uneven == uneven
        asked = tokens_of(chat("Hi"), tokenizer, add_generation_prompt=True)
        assert examples[0].input_ids[: len(asked)] == asked
        assert said(examples, tokenizer) == ["Hello<|eot_id|>"]
