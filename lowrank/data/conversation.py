"""What a row says, whatever format it is written in: a conversation, or a plain prompt and its completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.data.files import parsed_json
from lowrank.data.rowerror import RowError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as a chat template takes them.

    Attributes:
        messages: `role`, `content`, and what else the row gave (`tool_calls`, `name`, `reasoning_content` ...).
        tools: JSON schemas of the functions the model may call, or None.
        train: For each message, False where the row says `"train": false`.
        completion_from: The first message that belongs to the completion; None: after the last user message.
    """

    messages: list[Message]
    tools: list[Any] | None
    train: list[bool]
    completion_from: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no message says anything, or no assistant message does although there is one."""
        answers = [message for message in self.messages if message["role"] == "assistant"]
        return not any(_says_something(message) for message in answers or self.messages)


@dataclass(frozen=True, slots=True)
class Plain:
    """Text that no chat template goes around: `completion` carries loss, and an end token follows it."""

    prompt: str
    completion: str

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn."""
        return not self.completion.strip()


@dataclass(frozen=True, slots=True)
class Preference:
    """One prompt with a better and a worse answer. Read and shown; training on it is not part of this program yet."""

    chosen: Conversation | Plain
    rejected: Conversation | Plain

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn."""
        return self.chosen.is_empty or self.rejected.is_empty


def _says_something(message: Message) -> bool:
    content = message.get("content")
    return bool(message.get("tool_calls")) or bool(content.strip() if isinstance(content, str) else content)


def conversation(messages: Any, tools: Any = None, completion_from: int | None = None) -> Conversation:
    """A conversation from the values of a row, checked and brought into the form that chat templates expect.

    Keys whose value is None are left out, a content that is a list of text parts is joined, and tool arguments given as
    a JSON string become objects, as transformers documents them.

    Raises:
        RowError: a message is not one.
    """
    messages = _parsed(messages, "the messages")
    if not isinstance(messages, Sequence):
        raise RowError(
            f"the messages are {_kind(messages)}, not a list", 'Expected [{"role": ..., "content": ...}, ...].'
        )
    cleaned = [_message(message, at) for at, message in enumerate(messages)]
    train = [bool(message.pop("train", True)) for message in cleaned]
    return Conversation(cleaned, _tools(tools), train, completion_from)


class Arguments(dict[str, Any]):
    """A tool call's arguments that a row gives as JSON text, which is kept for templates that want it so."""

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        self.text = text


def _message(value: Any, at: int) -> Message:
    if not isinstance(value, Mapping):
        raise RowError(f"message {at + 1} is {_kind(value)}, not an object", 'Expected {"role": ..., "content": ...}.')
    message: Message = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"message {at + 1} has the role {role!r}", f"Roles are {', '.join(ROLES)}.")
    if "train" in message and not isinstance(message["train"], bool):
        raise RowError(f'message {at + 1}: "train" is {message["train"]!r}', "It is true or false.")
    if message.get("train") and role != "assistant":
        raise RowError(
            f'message {at + 1}: "train": true on a {role} message', "Only assistant messages are trained on."
        )
    if "content" in message:
        message["content"] = _content(message["content"], at)
    elif not message.get("tool_calls") and not message.get("reasoning_content"):
        message["content"] = ""
    if not isinstance(message.get("reasoning_content", ""), str):
        raise RowError(f"the reasoning of message {at + 1} is {_kind(message['reasoning_content'])}", "Expected text.")
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise RowError(f"the tool calls of message {at + 1} are {_kind(calls)}, not a list")
        message["tool_calls"] = [_tool_call(call, at) for call in calls]
    return message


def _content(content: Any, at: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(_is_text_part(part) for part in content):
        return "".join(part["text"] for part in content)
    raise RowError(
        f"the content of message {at + 1} is {_kind(content)}",
        "Expected text, or a list of parts of type text (images and sound cannot be trained on).",
    )


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _tool_call(call: Any, at: int) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise RowError(f"message {at + 1}: a tool call is {_kind(call)}", "Expected {'function': {'name': ...}}.")
    call = {key: item for key, item in call.items() if item is not None}
    if "function" not in call:
        call = {"type": "function", "function": call}
    function = call["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"message {at + 1}: a tool call without a function name")
    given = function.get("arguments", {})
    arguments = _parsed(given, f"message {at + 1}: the arguments of {function['name']}")
    if isinstance(given, str) and isinstance(arguments, dict):
        arguments = Arguments(arguments, given or "{}")
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(tools: Any) -> list[Any] | None:
    parsed = _parsed(tools, "the tools") if tools not in (None, "") else None
    if parsed is not None and not isinstance(parsed, list):
        raise RowError(f"the tools are {_kind(parsed)}, not a list")
    for at, tool in enumerate(parsed or []):
        if not isinstance(tool, Mapping):
            raise RowError(f"tool {at + 1} is {_kind(tool)}, not an object")
    return parsed or None


def _parsed(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    return parsed_json(value or "{}", f"{name} are")


def _kind(value: Any) -> str:
    names: dict[type, str] = {str: "a string", dict: "an object", list: "a list", bool: "a truth value"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
