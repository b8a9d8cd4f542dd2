"""One message of a row, in whatever style it is written, as chat templates take it; what is not understood is refused.

A key that is passed over can be the one that matters: the text under another name, a mark that says what is learned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.data.reading.data_files import parsed_json
from lowrank.data.reading.marks import MARKS, is_like_a_mark, mark_of, words_of
from lowrank.data.reading.row_error import RowError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

SPEAKERS = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Who speaks, as data sets call them, and the role that this is."""

CALLERS = ("function_call", "tool_call")
"""Speakers whose text is the JSON of calls."""

STYLES = {"role": "content", "from": "value"}
"""The key that says who speaks, and that of what is said."""

TEXTS = ("content", "value", "text", "message", "body", "utterance", "response", "output")
REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "reasoning_details")

_LIKE_REASONING = re.compile(
    r"^reasons?$|(?:^|[_\W])(?:reasoning|think|thought|scratch_?pad|monologue)|^(?:cot|rationale)$"
)


class Arguments(dict[str, Any]):
    """A tool call's arguments that a row gives as JSON text, which is kept for templates that want it so."""

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        self.text = text


def message_of(value: Any, at: int) -> tuple[Message, bool]:
    """A message, and whether it may carry loss.

    Keys whose value is None are left out, a content that is a list of text parts is joined, tool arguments given as a
    JSON string become objects, reasoning stands under `reasoning_content`, and calls under `tool_calls`.

    Args:
        value: What the row says; `role` and `content`, or `from` and `value`.
        at: Its index.

    Raises:
        RowError: it is no message, or says something under a key that is not known.
    """
    if not isinstance(value, Mapping):
        raise RowError(f"message {at + 1} is {kind(value)}, not an object", 'Expected {"role": ..., "content": ...}.')
    given = {key: item for key, item in value.items() if item is not None}
    speaker_key = next((key for key in STYLES if key in given), "role")
    speaker = given.pop(speaker_key, None)
    role = _role(speaker, speaker_key, given, at)
    message: Message = {"role": role}
    train = _train(given, role, at)
    calls = _calls(given, at)
    reasoning = _reasoning(given, role, at)
    text = given.pop(STYLES[speaker_key], None)
    _refuse_other_texts(given, text, STYLES[speaker_key], at, may_lack=bool(calls or reasoning))
    if speaker in CALLERS:
        calls, text = _list(parsed(text, f"message {at + 1}: the {speaker}")), None
    if text is not None:
        message["content"] = _content(text, at)
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [_tool_call(call, at) for call in calls]
    return {**message, **given}, train


def _role(speaker: Any, key: str, given: Message, at: int) -> str:
    if isinstance(speaker, str) and speaker in SPEAKERS:
        return SPEAKERS[speaker]
    if key == "from":
        raise RowError(f'turn {at + 1} is "from" {speaker!r}', f"Known are {', '.join(SPEAKERS)}.")
    if speaker is None:
        keys = ", ".join(map(repr, given)) or "no keys at all"
        raise RowError(f"message {at + 1} has no role: it has {keys}", 'Expected {"role": ..., "content": ...}.')
    raise RowError(f"message {at + 1} has the role {speaker!r}", f"Roles are {', '.join(ROLES)}.")


def _train(given: Message, role: str, at: int) -> bool:
    """Whether the message may carry loss; takes the marks out of it."""
    marks = {key: mark_of(key, given.pop(key), at) for key in MARKS if key in given}
    if len(set(marks.values())) > 1:
        raise RowError(f"message {at + 1} is marked twice, and differently: {' and '.join(map(repr, marks))}")
    for key, train in marks.items():
        if train and role != "assistant":
            raise RowError(
                f'message {at + 1}: "{key}" asks for loss on a {role} message',
                "Only assistant messages are trained on.",
            )
    for key, value in given.items():
        if is_like_a_mark(key, value):
            raise RowError(
                f"message {at + 1} has the key {key!r}, which is not known",
                'Whether a message carries loss is said by "train" or "loss", true or false, or "weight", 0 or 1.',
            )
    return all(marks.values())


def _reasoning(given: Message, role: str, at: int) -> str | None:
    """The reasoning before an answer, under whatever name; takes it out of the message."""
    found = {key: _thought(given.pop(key), at) for key in REASONING if key in given}
    unknown = next((key for key in given if _LIKE_REASONING.search(words_of(key))), None)
    if unknown is not None:
        raise RowError(
            f"message {at + 1} has the key {unknown!r}, which is not known",
            f"Reasoning stands under {' or '.join(REASONING)}.",
        )
    said = {text.strip(): text for text in found.values() if text.strip()}
    if len(said) > 1:
        raise RowError(f"message {at + 1} has different reasoning under {' and '.join(map(repr, found))}")
    if said and role != "assistant":
        raise RowError(f"message {at + 1}: reasoning in a {role} message", "Only assistants' messages have reasoning.")
    return next(iter(said.values()), None)


def _thought(value: Any, at: int) -> str:
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [None]
    texts = [part.get("text", part.get("summary")) if isinstance(part, Mapping) else None for part in parts]
    if all(isinstance(text, str) for text in texts):
        return "".join(map(str, texts))
    raise RowError(f"the reasoning of message {at + 1} is {kind(value)}", "Expected text.")


def _refuse_other_texts(given: Message, text: Any, expected: str, at: int, *, may_lack: bool) -> None:
    """Refuse a message that says something, or all that it says, under another key than it should."""
    others = [key for key in TEXTS if key != expected and given.get(key) not in (None, "", text)]
    if others:
        has = f"has the key {others[0]!r} beside" if text else f"says something under {others[0]!r}, not"
        raise RowError(f"message {at + 1} {has} {expected!r}", f"What a message says stands under {expected!r}.")
    if text is None and not may_lack:
        keys = ", ".join(map(repr, given)) or "nothing else"
        raise RowError(f"message {at + 1} has no {expected!r}; it has {keys}", f"Write it under {expected!r}.")


def _content(content: Any, at: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        other = next((part for part in content if not _is_text_part(part)), None)
        if other is None:
            return "".join(part["text"] for part in content)
        named = other.get("type") if isinstance(other, Mapping) else None
        what = f"a list with a part of type {named!r}" if named not in (None, "text") else "a list"
        raise RowError(
            f"the content of message {at + 1} is {what}",
            "Expected text, or a list of parts of type text (images and sound cannot be trained on).",
        )
    raise RowError(f"the content of message {at + 1} is {kind(content)}", "Write it as text, in quotes.")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _calls(given: Message, at: int) -> list[Any]:
    """The calls of a message, under the newer or the older name; takes them out of it."""
    calls = parsed(given.pop("tool_calls", None) or [], f"the tool calls of message {at + 1}")
    older = given.pop("function_call", None)
    if not isinstance(calls, list):
        raise RowError(f"the tool calls of message {at + 1} are {kind(calls)}, not a list")
    if older and calls:
        raise RowError(f"message {at + 1} has both 'tool_calls' and 'function_call'", "Leave the older one out.")
    return [older] if older else calls


def _tool_call(call: Any, at: int) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise RowError(f"message {at + 1}: a tool call is {kind(call)}", "Expected {'function': {'name': ...}}.")
    call = {key: item for key, item in call.items() if item is not None}
    if "function" not in call:
        call = {"type": "function", "function": call}
    function = call["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"message {at + 1}: a tool call without a function name")
    function = {key: item for key, item in function.items() if item is not None}
    given = function.pop("parameters", {}) if "arguments" not in function else function.pop("arguments")
    others = [key for key in function if key not in ("name", "id", "type", "index", "strict")]
    if others:
        raise RowError(
            f"message {at + 1}: the call of {function['name']} has the key {others[0]!r}, which is not known",
            "What a function is called with stands under 'arguments'.",
        )
    arguments = parsed(given, f"message {at + 1}: the arguments of {function['name']}")
    if not isinstance(arguments, Mapping):
        raise RowError(f"message {at + 1}: the arguments of {function['name']} are {kind(arguments)}, not an object")
    if isinstance(given, str):
        arguments = Arguments(arguments, given or "{}")
    return {**call, "function": {**function, "arguments": arguments}}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def parsed(value: Any, name: str) -> Any:
    """The value, or what it is where it is JSON text.

    Raises:
        RowError: it is text, but not JSON.
    """
    return parsed_json(value or "{}", f"{name} are") if isinstance(value, str) else value


def kind(value: Any) -> str:
    """What a value is, in words."""
    names: dict[type, str] = {str: "a string", dict: "an object", list: "a list", bool: "a truth value"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
