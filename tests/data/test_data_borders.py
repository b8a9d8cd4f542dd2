"""Where a token would lie across the border of a prompt: what is trained is what a model sees that is asked."""

from __future__ import annotations

import pytest
from data_families import CHATML, FAMILIES, GPT2_WORDS, HEADERS, IM, LLAMA3, LLAMA_WORDS, byte_level, sentence_piece

from lowrank.data import check_supervision, load_examples

BY_NAME = {family.name: family for family in FAMILIES}


def load(row, tokenizer, **options):
    return load_examples([row], tokenizer, max_length=1000, **options)


def split(example) -> tuple[list[int], list[int]]:
    """Prompt and answer of an example with one of each."""
    begin = example.supervised.index(True)
    end = len(example.supervised) - example.supervised[::-1].index(True)
    assert all(example.supervised[begin:end])
    return example.input_ids[:begin], example.input_ids[begin:end]


def ids(tokenizer, text) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("words", [GPT2_WORDS, LLAMA_WORDS])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Answer: ", "yes"),
        ("Write it.\n", "\ndef add(a, b):\n    return a + b"),
        ("code:\n\n", "    x = 1"),
        ("you ", "are"),
        ("add", "ing"),
        ("lines\n", "\n\n"[:1] + "more"),
        ("é", "té"),
    ],
)
def test_prompt_and_completion_are_the_tokens_of_each(words, prompt, completion):
    tokenizer = byte_level(IM, None, "<|im_end|>", words=words)
    examples = load({"prompt": prompt, "completion": completion}, tokenizer)
    asked, answered = split(examples[0])
    assert asked == ids(tokenizer, prompt)
    assert answered == [*ids(tokenizer, completion), tokenizer.eos_token_id]
    assert examples.report.uneven == int(ids(tokenizer, prompt + completion) != [*asked, *answered[:-1]])


@pytest.mark.parametrize("prepend", [True, False])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("Answer: ", "yes"), ("a", "nd"), ("line\n", "\nand"), ("a ", " b")]
)
def test_a_tokenizer_that_puts_a_space_before_every_text_puts_none_before_an_answer(prepend, prompt, completion):
    tokenizer = sentence_piece((), "<s>", "</s>", prepend)
    (example,) = load({"prompt": prompt, "completion": completion}, tokenizer)
    asked, answered = split(example)
    assert asked == [tokenizer.bos_token_id, *ids(tokenizer, prompt)]
    whole = tokenizer.decode(ids(tokenizer, prompt + completion))
    assert tokenizer.decode([*asked[1:], *answered[:-1]]) == whole


def test_a_chats_answer_that_begins_with_white_space():
    tokenizer = byte_level(IM, None, "<|im_end|>")
    tokenizer.chat_template = CHATML
    for said in ("\n  def f():\n    pass", " Hello", "\n", "\t\n\nx"):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
        if not said.strip():
            messages[1]["content"] = said = said + "."
        examples = load({"messages": messages}, tokenizer)
        check_supervision(examples, tokenizer)
        asked, answered = split(examples[0])
        chat = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
        assert asked == list(tokenizer.apply_chat_template(messages[:1], **chat)["input_ids"])
        assert tokenizer.decode(answered) == f"{said}<|im_end|>"


def test_several_borders_of_one_text():
    tokenizer = byte_level(IM, None, "<|im_end|>")
    tokenizer.chat_template = CHATML
    turns = [
        ("user", "Hi"),
        ("assistant", "\nA"),
        ("user", "So?"),
        ("assistant", "\nB"),
        ("user", "x"),
        ("assistant", "C"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    (example,) = load({"messages": messages}, tokenizer)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.input_ids) == text
    trained = [token for token, mark in zip(example.input_ids, example.supervised, strict=True) if mark]
    assert tokenizer.decode(trained) == "\nA<|im_end|>\nB<|im_end|>C<|im_end|>"


def test_a_template_whose_header_ends_within_a_token():
    """`assistant: ` and `are` meet inside the token ` are`."""
    tokenizer = byte_level(IM, None, "<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "are"}]
    asked, answered = split(load({"messages": messages}, tokenizer)[0])
    assert tokenizer.decode(asked).endswith("assistant: ")
    assert answered == [*ids(tokenizer, "are"), tokenizer.eos_token_id]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_border_no_change(family):
    """An answer that begins with a letter is encoded as the whole text is."""
    tokenizer = family.make()
    messages = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "I am fine"}]
    examples = load({"messages": messages}, tokenizer)
    assert examples.report.uneven == 0
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert examples[0].input_ids == ids(tokenizer, text)[: len(examples[0].input_ids)]


def test_two_line_breaks_of_a_header_are_what_the_prompt_alone_has():
    tokenizer = byte_level(HEADERS, "<|begin_of_text|>", "<|eot_id|>")
    tokenizer.chat_template = LLAMA3
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    asked, _ = split(load({"messages": messages}, tokenizer)[0])
    assert asked[-1:] == ids(tokenizer, "\n\n")
