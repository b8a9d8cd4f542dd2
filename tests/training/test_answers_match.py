"""When an answer counts as right."""

from __future__ import annotations

import pytest

from lowrank.training.evaluation.comparisons import same_json, same_text


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ('{"a":1,"b":[1,2]}', ' {"b": [1, 2], "a": 1.0} ', True),
        ('{"a":1}', '{"a":true}', False),
        ('{"a":0}', '{"a":false}', False),
        ('{"a":1}', '{"a":"1"}', False),
        ("[1,2]", "[2,1]", False),
        ('{"a":1}', '{"a":1,"b":2}', False),
        ('{"a":1} and more', '{"a":1}', False),
        ("not json", '{"a":1}', False),
        ("", "{}", False),
        ("[" * 100_000, "[]", False),
        ("null", "null", True),
    ],
)
def test_json(answer, expected, same):
    assert same_json(answer, expected) is same


def test_text():
    assert same_text(" yes\n", "yes")
    assert not same_text("Yes", "yes")
