"""What a row says, whatever format it is written in: a conversation, or a plain prompt and its completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.data.reading.messages import Message, kind, message_of, parsed
from lowrank.data.reading.row_error import RowError


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as a chat template takes them.

    Attributes:
        messages: `role`, `content`, and what else the row gave (`tool_calls`, `name`, `reasoning_content` ...).
        tools: JSON schemas of the functions the model may call, or None.
        train: For each message, False where the row says that it carries no loss.
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
    """One prompt with a better and a worse answer.

    Attributes:
        chosen: The better one, behind the prompt.
        rejected: The worse one, behind the same prompt.
        others: More that are worse than the chosen one.
        margin: By how much it is better, where the row says so.
    """

    chosen: Conversation | Plain
    rejected: Conversation | Plain
    others: tuple[Conversation | Plain, ...] = ()
    margin: float | None = None

    @property
    def answers(self) -> tuple[Conversation | Plain, ...]:
        """All of them, the chosen one first."""
        return self.chosen, self.rejected, *self.others

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn."""
        return any(answer.is_empty for answer in self.answers)


def _says_something(message: Message) -> bool:
    content = message.get("content")
    said = content.strip() if isinstance(content, str) else content
    return bool(said or message.get("tool_calls") or message.get("reasoning_content"))


def conversation(
    messages: Any, tools: Any = None, *, system: str | None = None, completion_from: int | None = None
) -> Conversation:
    """A conversation from the values of a row, checked and brought into the form that chat templates expect.

    Args:
        messages: A list of messages in the style of OpenAI or ShareGPT, or its JSON text.
        tools: A list of tools, or its JSON text.
        system: What a column of its own says that the system turn is. It is not written twice.
        completion_from: The first of the messages that belongs to the completion.

    Raises:
        RowError: a message is not one, or the system turn and the column of that name differ.
    """
    messages = parsed(messages, "the messages")
    if not isinstance(messages, Sequence):
        raise RowError(
            f"the messages are {kind(messages)}, not a list", 'Expected [{"role": ..., "content": ...}, ...].'
        )
    read = [message_of(message, at) for at, message in enumerate(messages)]
    if system and not _has_system(read, system):
        read.insert(0, ({"role": "system", "content": system}, True))
        completion_from = None if completion_from is None else completion_from + 1
    return Conversation([message for message, _ in read], _tools(tools), [train for _, train in read], completion_from)


def _has_system(read: Sequence[tuple[Message, bool]], system: str) -> bool:
    """Whether a message says what the column `system` says; RowError where one says something else."""
    for at, (message, _) in enumerate(read):
        if message["role"] in ("system", "developer"):
            if message["content"].strip() != system.strip():
                raise RowError(
                    f"the column 'system' and message {at + 1} ({message['role']}) say different things",
                    "Leave one of them out.",
                )
            return True
    return False


def _tools(tools: Any) -> list[Any] | None:
    found = parsed(tools, "the tools") if tools not in (None, "") else None
    if found is not None and not isinstance(found, list):
        raise RowError(f"the tools are {kind(found)}, not a list")
    for at, tool in enumerate(found or []):
        if not isinstance(tool, Mapping):
            raise RowError(f"tool {at + 1} is {kind(tool)}, not an object")
    return found or None
