"""Whatever style a message is written in, all of it is read, and what is not understood is refused by its name."""

from __future__ import annotations

import json

import pytest
from data_families import CHATML, IM, byte_level
from test_data_formats import MESSAGES, texts
from tiny import tiny_tokenizer

from lowrank.data.reading.conversation import Conversation, Plain
from lowrank.data.reading.formats import detect, read_row
from lowrank.errors import InputError

USER, ANSWER = MESSAGES
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"name": "add", "arguments": {"a": 1}}


def chat(*messages):
    return {"messages": list(messages)}


def turns(row):
    content = read_row(row, detect(row), has_template=True)
    assert isinstance(content, Conversation)
    return content


def learned(row, **options):
    return "".join(said for _, said in texts(row, **options))


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}])
@pytest.mark.parametrize("style", ["messages", "sharegpt", "prompt"])
def test_a_turn_that_is_marked_carries_no_loss(mark, style):
    wrong, right = {**ANSWER, "content": "WRONG", **mark}, ANSWER
    row = chat(USER, wrong, USER, right)
    if style == "sharegpt":
        said = [{"from": "gpt", "value": "WRONG", **mark}, {"from": "gpt", "value": "Hello", **dict.fromkeys(mark, 1 if "weight" in mark else True)}]  # fmt: skip
        asked = {"from": "human", "value": "Hi"}
        row = {"conversations": [asked, said[0], asked, said[1]]}
    if style == "prompt":
        row = {"prompt": [USER], "completion": [wrong, USER, right]}
    for train_on in ("assistant", "all"):
        said = learned(row, train_on=train_on)
        assert "WRONG" not in said
        assert "Hello<|im_end|>" in said


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        *(
            ({key: False}, rf"message 2 has the key '{key}', which is not known\nWhether a message carries loss is said by")
            for key in ("trainable", "training", "loss_mask", "masked", "loss_weight", "learn", "weights", "train_detail", "isTrained", "unmasked", "Loss-Weight")
        ),
        *(
            ({key: False}, rf"message 2 has the key '{key}', which is not known")
            for key in ("skip", "exclude", "is_target", "label", "requires_grad")
        ),
        ({"weight": 0.5}, r'message 2: "weight" is 0.5\nIt is 0 or 1; weights between are not trained'),
        ({"weight": "0"}, r'message 2: "weight" is \'0\''),
        ({"loss": 0.3}, r'message 2: "loss" is 0.3\nIt is true or false'),
        ({"loss": False, "weight": 1}, r"message 2 is marked twice, and differently: 'loss' and 'weight'"),
    ],
    ids=str,
)  # fmt: skip
def test_marks_that_cannot_be_followed_are_refused(mark, message):
    with pytest.raises(InputError, match=message):
        texts(chat(USER, {**ANSWER, **mark}))


@pytest.mark.parametrize("mark", [{"weight": 1}, {"loss": True}, {"train": True}])
def test_loss_on_a_question_is_refused(mark):
    with pytest.raises(InputError, match="asks for loss on a user message"):
        texts(chat({**USER, **mark}, ANSWER))


PIRATE = "Answer as a pirate"
ASKED = {
    "messages": chat(USER, ANSWER),
    "roles in conversations": {"conversations": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "prompt as messages": {"prompt": [USER], "completion": [ANSWER]},
    "prompt as text": {"prompt": "Hi", "completion": "Hello"},
    "question and answer": {"question": "Hi", "answer": "Hello"},
    "instruction and response": {"instruction": "Hi", "response": "Hello"},
}
WHOLE = (
    f"<|im_start|>system\n{PIRATE}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"
)


class TestSystemColumn:
    @pytest.mark.parametrize("column", ["system", "system_prompt"])
    @pytest.mark.parametrize("name", ASKED)
    def test_it_becomes_the_system_turn(self, name, column):
        ((text, said),) = texts({**ASKED[name], column: PIRATE})
        assert (text.rstrip(), said) == (WHOLE, "Hello<|im_end|>")

    @pytest.mark.parametrize("name", ["messages", "roles in conversations", "prompt as messages"])
    def test_it_is_not_written_twice(self, name):
        row = dict(ASKED[name])
        key = next(iter(row))
        row[key] = [{"role": "system", "content": PIRATE}, *row[key]]
        assert texts({**row, "system": PIRATE}) == texts(row)
        with pytest.raises(InputError, match=r"the column 'system' and message 1 \(system\) say different things"):
            texts({**row, "system": "Be brief"})

    def test_an_empty_one_is_none(self):
        assert texts({**ASKED["messages"], "system": ""}) == texts(ASKED["messages"])
        assert texts({**ASKED["messages"], "system": None}) == texts(ASKED["messages"])

    def test_two_columns(self):
        with pytest.raises(InputError, match="the columns 'system' and 'system_prompt' say different things"):
            texts({**ASKED["messages"], "system": "a", "system_prompt": "b"})

    @pytest.mark.parametrize("row", [{"text": "Once"}, ASKED["prompt as text"], ASKED["alpaca"]], ids=str)
    def test_where_no_template_goes_around_the_row_it_is_refused(self, row):
        tokenizer = tiny_tokenizer() if "text" in row else tiny_tokenizer(chat_template=None)
        with pytest.raises(InputError, match="the row has a system turn, and no chat template goes around it"):
            texts({**row, "system": PIRATE}, tokenizer)


class TestTexts:
    @pytest.mark.parametrize("key", ["text", "value", "contnet", "message"])
    def test_what_is_said_under_another_key_is_refused(self, key):
        with pytest.raises(InputError, match=rf"message 1 .*'{key}'"):
            texts(chat({"role": "user", key: "What is 2+2?"}, ANSWER))
        with pytest.raises(InputError, match=r"message 1 .*'contents'"):
            texts({"conversations": [{"from": "human", "contents": "Hi"}, {"from": "gpt", "value": "Hello"}]})
        with pytest.raises(InputError, match=r"message 1 says something under 'content', not 'value'"):
            texts({"conversations": [{"from": "human", "content": "Hi"}, {"from": "gpt", "value": "Hello"}]})

    def test_two_texts_in_one_message(self):
        with pytest.raises(InputError, match="message 2 has the key 'text' beside 'content'"):
            texts(chat(USER, {**ANSWER, "text": "Something else"}))
        assert texts(chat(USER, {**ANSWER, "text": "Hello"})) == texts(chat(USER, {**ANSWER, "text": ""}))

    @pytest.mark.parametrize("content", [None, 3, True, 3.1, {"a": 1}])
    def test_a_content_that_is_no_text(self, content):
        with pytest.raises(
            InputError, match=r"message 2 has no 'content'|the content of message 2 is .*\nWrite it as text"
        ):
            texts(chat(USER, {**ANSWER, "content": content}))

    @pytest.mark.parametrize("row", [{"prompt": "a", "completion": 3}, {"instruction": "a", "output": True}], ids=str)
    def test_numbers_are_not_written_out_unasked(self, row):
        with pytest.raises(InputError, match="Write it as text, in quotes"):
            texts(row)

    def test_roles(self):
        styles = [("human", "gpt"), ("user", "model"), ("user", "assistant")]
        rows = [chat({**USER, "role": asks}, {**ANSWER, "role": says}) for asks, says in styles]
        assert texts(rows[0]) == texts(rows[1]) == texts(rows[2])
        for role in ("Assistant", "bot", "narrator", None, 3):
            with pytest.raises(InputError, match=r"message 2 has (the role|no role)"):
                texts(chat(USER, {**ANSWER, "role": role}))

    def test_conversations_as_json_text(self):
        row = {"conversations": json.dumps(ASKED["sharegpt"]["conversations"])}
        assert texts(row) == texts(ASKED["sharegpt"])

    def test_a_picture_is_named(self):
        parts = [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "x"}}]
        with pytest.raises(InputError, match="a list with a part of type 'image_url'"):
            texts(chat({**USER, "content": parts}, ANSWER))


class TestCalls:
    WRITTEN = (
        {"tool_calls": [{"type": "function", "function": CALL}], "content": None},
        {"tool_calls": [CALL], "content": None},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": {"name": "add", "arguments": '{"a": 1}'}, "content": None},
        {"tool_calls": [{"name": "add", "parameters": {"a": 1}}]},
    )

    @pytest.mark.parametrize("written", WRITTEN, ids=str)
    def test_every_way_of_calling_is_one(self, written):
        row = chat(USER, {"role": "assistant", **written}, {"role": "function", "name": "add", "content": "2"}, ANSWER)
        content = turns(row)
        assert content.messages[1] == {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
        assert content.messages[2] == {"role": "tool", "name": "add", "content": "2"}
        assert '"name": "add"' in learned(row, tokenizer=tiny_tokenizer(THINKING))

    def test_the_functions_of_the_older_api_are_tools(self):
        function = {"name": "add", "parameters": {}}
        row = {**chat(USER, ANSWER), "functions": [function]}
        assert turns(row).tools == [{"type": "function", "function": function}]
        assert turns({**chat(USER, ANSWER), "functions": json.dumps([function]), "tools": []}).tools == turns(row).tools
        with pytest.raises(InputError, match="has both 'tools' and 'functions'"):
            texts({**row, "tools": [function]})

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            ({"name": "add", "args": {"a": 1}}, "the call of add has the key 'args', which is not known"),
            ({"name": "add", "arguments": [1]}, "the arguments of add are a list, not an object"),
            ({"name": "add", "arguments": "{a: 1}"}, "the arguments of add are not valid JSON"),
            ({"arguments": {}}, "a tool call without a function name"),
        ],
    )
    def test_calls_that_cannot_be_read(self, call, message):
        with pytest.raises(InputError, match=message):
            texts(chat(USER, {"role": "assistant", "tool_calls": [call]}))


class TestReasoning:
    @pytest.mark.parametrize(
        "reasoning",
        [
            *({key: "Hm."} for key in ("reasoning_content", "reasoning", "thinking", "thought")),
            {"reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]},
            {"reasoning": "Hm.", "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]},
        ],
        ids=str,
    )
    def test_it_is_learned_whatever_it_is_called(self, reasoning):
        row = chat(USER, {**ANSWER, **reasoning})
        assert learned(row, tokenizer=tiny_tokenizer(THINKING)) == "<think>Hm.</think>Hello<|im_end|>"
        with pytest.raises(InputError, match="the chat template leaves out part of message 2"):
            texts(row, byte_chatml())

    @pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning", "thought"])
    @pytest.mark.parametrize("reads", ["m.{}", "m['{}']", 'm.get("{}")'])
    def test_it_reaches_a_template_under_the_name_that_it_reads(self, name, reads):
        template = THINKING.replace("m.reasoning_content", reads.format(name))
        said = learned(chat(USER, {**ANSWER, "reasoning": "Hm."}), tokenizer=tiny_tokenizer(template))
        assert said == "<think>Hm.</think>Hello<|im_end|>"

    @pytest.mark.parametrize(
        ("reasoning", "message"),
        [
            ({"reasoning": "a", "thinking": "b"}, "different reasoning under 'reasoning' and 'thinking'"),
            ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}, "the reasoning of message 2 is a list"),
            ({"reasoning_text": "a"}, "message 2 has the key 'reasoning_text', which is not known\nReasoning stands under"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_read_is_refused(self, reasoning, message):
        with pytest.raises(InputError, match=message):
            texts(chat(USER, {**ANSWER, **reasoning}), tiny_tokenizer(THINKING))

    def test_other_keys_are_left_alone(self):
        others = {"finish_reason": "stop", "gloss": "hello", "id": 3, "timestamp": "now"}
        assert texts(chat(USER, {**ANSWER, **others})) == texts(chat(USER, ANSWER))

    def test_a_question_has_none(self):
        with pytest.raises(InputError, match="reasoning in a user message"):
            texts(chat({**USER, "thinking": "a"}, ANSWER))


def byte_chatml():
    tokenizer = byte_level(IM, None, "<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


class TestNames:
    @pytest.mark.parametrize(
        "row",
        [
            {"question": "Hi", "answer": " Hello"},
            {"prompt": "Hi", "response": " Hello"},
            {"input": "Hi", "output": " Hello"},
            {"query": "Hi", "response": " Hello", "id": 3, "source": "x"},
        ],
        ids=str,
    )
    def test_prompts_and_completions_under_known_names(self, row):
        assert detect(row) == "prompt_completion"
        assert read_row(row, "prompt_completion", has_template=True) == Plain("Hi", " Hello")

    def test_instructions_under_known_names(self):
        expected = texts({"instruction": "Add", "input": "1, 2", "output": "3"})
        assert texts({"instruction": "Add", "context": "1, 2", "response": "3", "category": "sum"}) == expected
        assert texts({"instruction": "Add", "context": "1, 2", "output": "3"}) == expected

    @pytest.mark.parametrize(
        "row",
        [
            {"question": "Hi", "answer": "a", "response": "b"},
            {"question": "Hi", "context": "c", "answer": "a"},
            {"prompt": "Hi", "question": "c", "answer": "a"},
            {"question": "Hi", "answer": "a", "reasoning": "because"},
        ],
        ids=str,
    )
    def test_what_can_be_meant_in_two_ways_is_refused(self, row):
        with pytest.raises(InputError, match=r"it is not clear what they are\nSay which is which by data.columns"):
            texts(row)

    @pytest.mark.parametrize("key", ["weight", "loss_mask", "sample_weight", "chat_template_kwargs", "documents"])
    def test_a_column_that_would_change_what_is_learned_is_not_passed_over(self, key):
        with pytest.raises(InputError, match=f"the row has the key '{key}', which is not read"):
            texts({**chat(USER, ANSWER), key: [0.5]})
        with pytest.raises(InputError, match="the row as a whole is marked 'train': false"):
            texts({**chat(USER, ANSWER), "train": False})
        assert texts({**chat(USER, ANSWER), key: None, "weight": 1, "loss": 2.3}) == texts(chat(USER, ANSWER))

    @pytest.mark.parametrize(
        "mark",
        [
            *({key: [0, 1]} for key in ("mask", "turn_mask", "trainMask", "loss_weights", "train", "is_trained")),
            {"masked": True}, {"ignore": True}, {"isTrainable": False}, {"train": "false"}, {"sample_weights": 0.5}, {"weight": "0"},
        ],
        ids=str,
    )  # fmt: skip
    def test_marks_of_a_row_by_whatever_name_are_refused(self, mark):
        with pytest.raises(InputError, match="which is not read"):
            texts({**chat(USER, ANSWER), **mark})

    def test_an_answer_that_is_rated_wrong_is_not_learned_as_right(self):
        with pytest.raises(InputError, match=r"(?s)labelled false.*training.objective: kto"):
            texts({"prompt": "2+2=", "completion": "5", "label": False})
        assert texts({**chat(USER, ANSWER), "label": True}) == texts(chat(USER, ANSWER))

    @pytest.mark.parametrize("key", ["training_step", "loss", "train_ids", "weight", "masked", "label", "split"])
    def test_what_a_row_keeps_of_itself_is_no_mark(self, key):
        said = {
            "training_step": 3,
            "train_ids": [7, 12],
            "weight": "1.0",
            "masked": False,
            "label": 0,
            "split": "train",
        }
        assert texts({**chat(USER, ANSWER), key: said.get(key, 0.0)}) == texts(chat(USER, ANSWER))

    @pytest.mark.parametrize("empty", ["", "  ", None])
    def test_an_empty_system_column_is_none(self, empty):
        row = {"prompt": "Hi", "completion": "Hello"}
        assert texts({**row, "system": empty}) == texts(row)

    @pytest.mark.parametrize("key", ["system_prompt", "system_message", "system_instruction"])
    def test_the_system_column_by_other_names(self, key):
        row = chat(USER, ANSWER)
        assert texts({**row, key: "Be brief"}) == texts({**row, "system": "Be brief"}) != texts(row)

    def test_a_turn_of_reasoning_alone_is_a_turn(self):
        thought = {"role": "assistant", "content": "", "reasoning_content": "Hm."}
        assert learned(chat(USER, thought), tokenizer=tiny_tokenizer(THINKING)) == "<think>Hm.</think><|im_end|>"
