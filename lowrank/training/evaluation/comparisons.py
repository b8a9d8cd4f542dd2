"""When a generated answer is right: a function a comparison, by name; the config reads the names, without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_CHANNELS = re.compile(r"^\s*(analysis.*assistant)?final(?=\s*[\[{\"\d-])", re.DOTALL)


def same_text(answer: str, expected: str) -> bool:
    """Equal but for white space at the ends."""
    return answer.strip() == expected.strip()


def same_json(answer: str, expected: str) -> bool:
    """Equal as JSON values: key order and layout do not matter, 3 is 3.0. An answer that is no JSON is wrong.

    What has been thought before the answer is not compared.
    """
    try:
        value = json.loads(_reply(answer))
    except (ValueError, RecursionError):  # "[[[[[[..." is what an untrained model may say
        return False
    return _same_value(value, json.loads(_reply(expected)))


def is_json(answer: str) -> bool:
    """Whether an answer is JSON, but for what has been thought before it."""
    try:
        json.loads(_reply(answer))
    except (ValueError, RecursionError):
        return False
    return True


def _reply(answer: str) -> str:
    """What stands behind the reasoning; harmony's channels leave their names when their marks are taken away."""
    behind = answer.rpartition("</think>")[2]
    return _CHANNELS.sub("", behind)


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_value(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same_value, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)  # to Python, 1 == True


COMPARISONS: dict[str, Callable[[str, str], bool]] = {"text": same_text, "json": same_json}
"""`same(answer, expected)` by name."""
