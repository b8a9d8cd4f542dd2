"""In which form a chat template wants an assistant's tool calls: found by letting it write one.

Transformers documents arguments as objects and a message without content. Some templates put the arguments together
as text, some ask every message for its content, and Kimi's names a function by the id of its call alone:
`functions.get_weather:0`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.data.reading.messages import Arguments, Message

_NAME, _KEY, _VALUE = "get_weather", "city", "Paris"


@dataclass(frozen=True, slots=True)
class CallForm:
    """One form.

    Attributes:
        with_content: A message without content gets an empty one.
        as_text: Arguments are JSON text instead of objects.
        named_ids: The id of a call, and of its result, is made of the function's name and a number.
    """

    with_content: bool
    as_text: bool
    named_ids: bool = False

    def written(self, messages: Sequence[Message]) -> list[Message]:
        """A conversation with its tool calls in this form."""
        found = [self._message(message) if message.get("tool_calls") else message for message in messages]
        return _with_named_ids(found) if self.named_ids else found

    def _message(self, message: Message) -> Message:
        content = {"content": ""} if self.with_content and "content" not in message else {}
        calls = [self._call(call) for call in message["tool_calls"]] if self.as_text else message["tool_calls"]
        return {**message, **content, "tool_calls": calls}

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function.get("arguments", {})
        text = arguments.text if isinstance(arguments, Arguments) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}


def _with_named_ids(messages: Sequence[Message]) -> list[Message]:
    ids: dict[Any, str] = {}
    called: list[str] = []
    results = 0
    found = []
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                called.append(f"functions.{call['function']['name']}:{len(called)}")
                ids[call.get("id")] = called[-1]
                calls.append({**call, "id": called[-1]})
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool" and results < len(called):
            message = {**message, "tool_call_id": ids.get(message.get("tool_call_id"), called[results])}
            results += 1
        found.append(message)
    return found


FORMS = [
    *[CallForm(with_content, as_text) for as_text in (False, True) for with_content in (False, True)],
    *[CallForm(with_content, as_text=False, named_ids=True) for with_content in (False, True)],
]
"""What transformers documents first."""


def probe_call() -> dict[str, Any]:
    """A tool call to try a template with; its id is one that Mistral's templates accept."""
    return {"id": "call00001", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}


def is_whole(text: str) -> bool:
    """Whether a template has written `probe_call` as the model is to say it: not as Python, nor as JSON in JSON."""
    return all(part in text for part in (_NAME, _KEY, _VALUE)) and "{'" not in text and '\\"' not in text
