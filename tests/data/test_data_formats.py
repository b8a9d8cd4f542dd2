"""What rows of each format say, and how rows that fit none are refused."""

from __future__ import annotations

import json

import pytest
from data_families import CHATML, IM, byte_level
from tiny import tiny_tokenizer

from lowrank.data import answer_of, load_examples, prompt_of, use_template
from lowrank.data.reading.conversation import Conversation
from lowrank.data.reading.formats import FORMATS, detect, read_row
from lowrank.errors import InputError

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def texts(row, tokenizer=None, **options):
    """The whole text and the supervised text of each example of a row."""
    tokenizer = tokenizer or tiny_tokenizer()
    examples = load_examples([row], tokenizer, max_length=10_000, **options)
    decode = tokenizer.decode
    return [
        (decode(e.input_ids), decode([t for t, s in zip(e.input_ids, e.supervised, strict=True) if s]))
        for e in examples
    ]


ROWS = {
    "messages": {"messages": MESSAGES},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "alpaca": {"instruction": "Greet", "input": "", "output": "Hello"},
    "prompt_completion": {"prompt": "Hi", "completion": " Hello"},
    "text": {"text": "Hello"},
    "preference": {"prompt": "Hi", "chosen": " Hello", "rejected": " No"},
}


def test_every_format_is_found_by_its_keys():
    assert {name: detect(row) for name, row in ROWS.items()} == {name: name for name in FORMATS}


def test_the_same_conversation_in_three_formats():
    alpaca = {"instruction": "Hi", "input": "", "output": "Hello"}
    assert texts(ROWS["messages"]) == texts(ROWS["sharegpt"]) == texts(alpaca)


def test_alpaca_with_input():
    ((text, said),) = texts({"instruction": "Add", "input": "1, 2", "output": "3"})
    assert "<|im_start|>user\nAdd\n\n1, 2<|im_end|>" in text
    assert said == "3<|im_end|>"


def test_alpaca_history_is_context():
    row = {"instruction": "And?", "input": "", "output": "Yes", "history": [["One?", "1"]], "system": "Brief."}
    ((text, said),) = texts(row)
    assert said == "Yes<|im_end|>"
    assert "system\nBrief.<|im_end|>" in text
    assert "assistant\n1<|im_end|>" in text


def test_alpaca_without_a_chat_template_is_written_as_its_authors_did():
    tokenizer = tiny_tokenizer(chat_template=None)
    ((text, said),) = texts(ROWS["alpaca"], tokenizer)
    assert "### Instruction:\nGreet\n\n### Response:\nHello" in text
    assert said == "Hello<|im_end|>"


def test_prompt_and_completion_as_text_get_no_template():
    assert texts(ROWS["prompt_completion"]) == [("Hi Hello<|im_end|>", " Hello<|im_end|>")]


def test_an_end_token_that_the_completion_has_is_not_written_twice():
    assert texts({"prompt": "Hi", "completion": " Hello<|im_end|>"}) == texts(ROWS["prompt_completion"])


def test_prompt_and_completion_as_messages():
    row = {"prompt": [*MESSAGES, {"role": "user", "content": "So?"}], "completion": [MESSAGES[1]]}
    assert [said for _, said in texts(row)] == ["Hello<|im_end|>"]


def test_text_is_learned_whole_and_ended():
    assert texts(ROWS["text"]) == [("Hello<|im_end|>", "ello<|im_end|>")]


def test_sharegpt_with_tools():
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    row = {
        "conversations": [
            {"from": "human", "value": "1+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "3."},
        ],
        "tools": json.dumps(tools),
        "system": "Use tools.",
    }
    content = read_row(row, "sharegpt", has_template=True)
    assert isinstance(content, Conversation)
    assert [message["role"] for message in content.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert content.messages[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert content.tools == tools


def test_messages_as_json_text():
    assert texts({"messages": json.dumps(MESSAGES)}) == texts(ROWS["messages"])


def test_a_list_of_text_parts_is_joined():
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    assert texts({"messages": [MESSAGES[0], {"role": "assistant", "content": parts}]}) == texts(ROWS["messages"])


def test_preferences_are_no_answers_to_learn():
    with pytest.raises(InputError, match=r"(?s)row 1: .*chosen and a rejected answer.*Set training.objective: dpo"):
        texts(ROWS["preference"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"asked": "Hi", "said": "Hello"}, r"row 1: the row has 'asked', 'said', which fits none"),
        ({"messages": "Hi"}, r"row 1: the messages are not valid JSON"),
        ({"messages": {"role": "user"}}, r"row 1: the messages are an object, not a list"),
        ({"messages": ["Hi"]}, r"row 1: message 1 is a string, not an object"),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, r"message 1 has the role 'bot'\nRoles are"),
        ({"messages": [{"role": "user", "content": 3}]}, r"the content of message 1 is"),
        ({"messages": MESSAGES[:1]}, r"row 1: the conversation has no assistant turn"),
        ({"messages": [{**MESSAGES[1], "train": "no"}]}, r"message 1: \"train\" is 'no'"),
        ({"conversations": [{"from": "alien", "value": "Hi"}]}, r"turn 1 is \"from\" 'alien'"),
        ({"instruction": 1, "output": "2"}, r"'instruction' is not text but 1"),
        ({"prompt": "Hi", "completion": MESSAGES}, r"neither both text nor both lists"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"the content of message 1 is a list"),
        (
            {"messages": [{"role": "assistant", "tool_calls": 3}]},
            r"the tool calls of message 1 are a number, not a list",
        ),
        ({"messages": [{**MESSAGES[1], "reasoning_content": 3}]}, r"the reasoning of message 1 is a number"),
        ({"messages": MESSAGES, "tools": [3]}, r"row 1: tool 1 is a number, not an object"),
        ({"conversations": [{"from": ["gpt"], "value": "Hi"}]}, r"turn 1 is \"from\" \['gpt'\]"),
        ({"instruction": "1", "output": "2", "history": ["ab"]}, r"the history is not a list of pairs"),
        ({"question": "Hi", "answer": None, "text": None, "instruction": 3}, r"fits none of the known formats"),
        ({"text": "a", 1: "b"}, r"row 1: the row has keys that are no texts"),
        ({"text": "half \ud83d"}, r"row 1: the row holds half of a surrogate pair"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_used(row, message):
    with pytest.raises(InputError, match=message):
        texts(row)


def test_a_list_that_holds_something_else_than_rows():
    with pytest.raises(InputError, match=r"row 2: the row is not an object: \[1\]"):
        load_examples([ROWS["text"], [1]], tiny_tokenizer(), max_length=100)


def test_under_all_a_prompt_of_plain_text_is_learned_too():
    assert texts(ROWS["prompt_completion"], train_on="all") == [("Hi Hello<|im_end|>", "i Hello<|im_end|>")]


def test_a_row_of_another_format_than_the_first():
    with pytest.raises(InputError, match=r"row 2: the row has 'text', but lacks 'messages'\nExpected \{\"messages\""):
        load_examples([ROWS["messages"], ROWS["text"]], tiny_tokenizer(), max_length=100)


def test_a_named_format_wins_over_looking():
    row = {"messages": MESSAGES, "text": "Once"}
    assert texts(row, format="text") == texts({"text": "Once"})
    with pytest.raises(InputError, match=r"there is no format 'txt'\nFormats: messages, sharegpt"):
        texts(row, format="txt")


class TestGeneration:
    def test_prompt_and_answer_of_a_chat(self):
        tokenizer = tiny_tokenizer()
        row = {"messages": [*MESSAGES, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes"}]}
        assert tokenizer.decode(prompt_of(row, tokenizer)).endswith("user\nSo?<|im_end|>\n<|im_start|>assistant\n")
        assert answer_of(row) == "Yes"

    @pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "prompt_completion"])
    def test_training_continues_the_prompt(self, name):
        tokenizer = tiny_tokenizer()
        (example,) = load_examples([ROWS[name]], tokenizer, max_length=1000)
        prompt = prompt_of(ROWS[name], tokenizer)
        assert example.input_ids[: len(prompt)] == prompt
        assert not any(example.supervised[: len(prompt)])
        answer = tokenizer.decode(example.input_ids[len(prompt) :])
        assert answer.startswith(answer_of(ROWS[name]))

    def test_a_row_without_an_answer(self):
        with pytest.raises(InputError, match="no assistant turn"):
            answer_of({"messages": MESSAGES[:1]})


class TestTemplates:
    """The templates of the package, for tokenizers that have none."""

    MARKS = {  # noqa: RUF012
        "chatml": IM,
        "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "gemma": ("<start_of_turn>", "<end_of_turn>"),
        "phi": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "mistral": ("[INST]", "[/INST]"),
        "plain": (),
    }

    @pytest.mark.parametrize("name", MARKS)
    def test_multi_turn_chats_are_learned_exactly(self, name):
        tokenizer = byte_level((*self.MARKS[name], "<|im_end|>"), "<s>", "</s>")
        use_template(tokenizer, name)
        row = {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES, *MESSAGES]}
        ((text, said),) = texts(row, tokenizer)
        end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi": "<|end|>"}.get(
            name, "</s>"
        )
        assert said == f"Hello{end}" * 2
        assert "Be brief." in text

    def test_a_file_and_a_text(self, tmp_path):
        tokenizer = byte_level(IM, None, "<|im_end|>")
        (tmp_path / "mine.jinja").write_text(CHATML)
        use_template(tokenizer, str(tmp_path / "mine.jinja"))
        assert tokenizer.chat_template == CHATML
        use_template(tokenizer, CHATML + " ")
        assert tokenizer.chat_template == CHATML + " "

    def test_what_does_not_fit(self):
        tokenizer = byte_level(IM, None, "<|im_end|>")
        with pytest.raises(InputError, match=r"does not have the special tokens.*\nTemplates that fit: chatml, plain"):
            use_template(tokenizer, "gemma")
        with pytest.raises(InputError, match="there is no chat template 'gamma'"):
            use_template(tokenizer, "gamma")
