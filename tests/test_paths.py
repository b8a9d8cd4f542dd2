"""Paths: `~` and variables are replaced, and what cannot be is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.errors import InputError
from lowrank.paths import as_written, expanded

HERE = {"HOME": "/home/me/", "DATA": "/data", "A_1": "x", "EMPTY": "", "MONEY": "a$DATA~"}


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("~", "/home/me/"),
        ("~/runs", "/home/me/runs"),
        ("~root/runs", "/root/runs"),
        ("a/~", "a/~"),
        ("./~/b", "./~/b"),
        ("a~b", "a~b"),
        ("$DATA/rows.jsonl", "/data/rows.jsonl"),
        ("${DATA}s/$A_1-$A_1", "/datas/x-x"),
        ("a/$$DATA", "a/$DATA"),
        ("a$", "a$"),
        ("a/$-b$ c", "a/$-b$ c"),
        ("$MONEY", "a$DATA~"),
        ("runs/try #2", "runs/try #2"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
    ],
)
def test_what_stands_for_what(written, path):
    assert expanded(written, environment=HERE) == path


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("$NOPE/a", "here: the variable NOPE in '$NOPE/a' is not set\nSet it, or write $$ for a dollar sign."),
        ("a/${NOPE}", "the variable NOPE in 'a/${NOPE}' is not set"),
        ("$DATAS", "the variable DATAS in"),
        ("a\0b", "holds a NUL, which no file's name can"),
        ("$EMPTY/a", "the variable EMPTY in '$EMPTY/a' is empty"),
        ("${DATA:-x}", "${DATA:-x} in '${DATA:-x}' is not the name of a variable"),
        ("${}", "is not the name of a variable"),
        ("~nobody-of-that-name/a", "there is no user 'nobody-of-that-name'"),
        ("", "the path is empty"),
        ("caf\udce9", "holds bytes that are not UTF-8"),
    ],
)
def test_what_is_refused(written, message):
    with pytest.raises(InputError) as raised:
        expanded(written, "here", environment=HERE)
    assert message in str(raised.value)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_writing_is_the_inverse_of_reading(path):
    there = path if not path.startswith("~") else f"./{path}"
    assert expanded(as_written(path), environment={}) == there
