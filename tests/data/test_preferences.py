"""Rows with better and worse answers: what is read as which, and what is refused."""

from __future__ import annotations

import json

import pytest

from lowrank.data.reading.conversation import Plain
from lowrank.data.reading.judged import judged
from lowrank.data.reading.row_error import RowError

ASKED = {"role": "user", "content": "How are you?"}
SYSTEM = {"role": "system", "content": "Be short."}


def said(text):
    return {"role": "assistant", "content": text}


def read(row, *, paired=True, has_template=True):
    return judged(row, None, has_template, paired=paired)


TEXTS = {
    "a prompt": {"prompt": "Q:", "chosen": " yes", "rejected": " no"},
    "a common beginning": {"chosen": "Q: yes", "rejected": "Q: no"},
    "a null prompt": {"prompt": None, "chosen": "Q: yes", "rejected": "Q: no"},
}


@pytest.mark.parametrize("row", TEXTS.values(), ids=TEXTS)
def test_texts(row):
    assert read(row).answers == (Plain("Q:", " yes"), Plain("Q:", " no"))
    assert read(row).liked == (True, False)


MESSAGES = {
    "a prompt": {"prompt": [SYSTEM, ASKED], "chosen": [said("Fine")], "rejected": [said("So so")]},
    "conversations": {"chosen": [SYSTEM, ASKED, said("Fine")], "rejected": [SYSTEM, ASKED, said("So so")]},
    "a prompt that is written again": {
        "prompt": [SYSTEM, ASKED],
        "chosen": [SYSTEM, ASKED, said("Fine")],
        "rejected": [SYSTEM, ASKED, said("So so")],
    },
    "the question as a text": {
        "prompt": "How are you?",
        "chosen": [SYSTEM, ASKED, said("Fine")],
        "rejected": [SYSTEM, ASKED, said("So so")],
    },
    "json": {
        "prompt": json.dumps([SYSTEM, ASKED]),
        "chosen": json.dumps([said("Fine")]),
        "rejected": json.dumps([said("So so")]),
    },
}


@pytest.mark.parametrize("row", MESSAGES.values(), ids=MESSAGES)
def test_messages(row):
    chosen, rejected = read(row).answers
    assert [message["content"] for message in chosen.messages] == ["Be short.", "How are you?", "Fine"]
    assert rejected.messages == [*chosen.messages[:2], said("So so")]
    assert chosen.completion_from == rejected.completion_from == 2


def test_answers_of_several_turns_begin_where_they_part():
    common = [ASKED, said("Fine. And you?"), {"role": "user", "content": "Tired"}]
    found = read({"chosen": [*common, said("Sleep")], "rejected": [*common, said("Work")]})
    assert [answer.completion_from for answer in found.answers] == [3, 3]


def test_several_rejected_answers_and_a_margin():
    found = read({"prompt": "Q:", "chosen": " yes", "rejected": [" no", " never"], "margin": 0.5})
    assert [answer.completion for answer in found.answers] == [" yes", " no", " never"]
    assert (found.liked, found.margin) == ((True, False, False), 0.5)
    chats = read({"prompt": [ASKED], "chosen": [said("Fine")], "rejected": [[said("Bad")], [said("Worse")]]})
    assert [answer.messages[-1]["content"] for answer in chats.answers] == ["Fine", "Bad", "Worse"]


def test_json_that_is_an_answer_is_no_conversation():
    found = read({"prompt": "List:", "chosen": '[{"n": 1}]', "rejected": '[{"n": 2}]'})
    assert found.answers[0] == Plain("List:", '[{"n": 1}]')


def test_ratings():
    row = {"prompt": "Q:", "completion": " yes"}
    for label, liked in ((True, True), (False, False), (1, True), ("false", False)):
        assert read({**row, "label": label}, paired=False).liked == (liked,)
    chat = read({"messages": [ASKED, said("Fine")], "label": False}, paired=False)
    assert (chat.liked, chat.answers[0].messages[-1]["content"]) == ((False,), "Fine")
    assert read(TEXTS["a prompt"], paired=False).liked == (True, False)


REFUSED = [
    ({"prompt": "Q:", "chosen": " yes", "rejected": ""}, "the rejected answer is empty", True),
    ({"prompt": "Q:", "chosen": " ", "rejected": " no"}, "the chosen answer is empty", True),
    ({"prompt": "Q:", "chosen": " yes", "rejected": []}, "there is no rejected answer", True),
    ({"chosen": "yes", "rejected": "no"}, "there is no prompt", True),
    ({"prompt": "Q:", "chosen": " yes", "rejected": [said("no")]}, "neither both text nor both lists", True),
    ({"chosen": "yes", "rejected": [said("no")]}, "neither all text nor all lists", True),
    (
        {"prompt": "Else?", "chosen": [ASKED, said("Fine")], "rejected": [ASKED, said("Bad")]},
        "the prompt is none of the messages",
        True,
    ),
    ({"prompt": "Q:", "chosen": " yes", "rejected": " no", "margin": "much"}, "the margin is 'much'", True),
    ({"prompt": "Q:", "completion": " yes"}, "the row has no chosen and rejected", True),
    ({"prompt": "Q:", "completion": " yes"}, 'the row has no a label|the row has no .*"label"', False),
    ({"prompt": "Q:", "completion": " yes", "label": "maybe"}, "the label is 'maybe'", False),
    ({"prompt": "Q:", "completion": " yes", "label": 0.5}, "the label is 0.5", False),
    ({"prompt": "Q:", "completion": " ", "label": True}, "the answer is empty", False),
    ({**TEXTS["a prompt"], "label": True}, "chosen and rejected, and a label", False),
]


@pytest.mark.parametrize(("row", "message", "paired"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_what_is_refused(row, message, paired):
    with pytest.raises(RowError, match=message):
        read(row, paired=paired)
