"""One trained turn in its text: where what the model has to say begins, and where it ends.

It begins where the template's generation prompt ends, if the template writes the turn behind that prompt. Some do not:

    asked      ...<|im_start|>assistant\\n<think>\\n              Nemotron, Qwen 3.5, DeepSeek R1's distilled models
    written    ...<|im_start|>assistant\\n<think></think>Hello begins behind the header, before the reasoning
    written    ...<|im_start|>assistant\\nHello               without any

    asked      [INST]Be brief.\\n\\nHi[/INST]                  Mistral Nemo, harmony: what stands before is written
    written    [INST]Hi[/INST]Hello</s>                      otherwise once there is an answer
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lowrank.data.reading.conversation import Conversation
from lowrank.data.reading.messages import Message
from lowrank.data.reading.row_error import RowError
from lowrank.data.supervision.template import ChatTemplate, first_difference

# Marks of reasoning that a generation prompt may end with: opened, or opened and closed again.
_MARK = r"(?:<\|?{0}think(?:ing)?\|?>|<{0}seed:think>|\[{0}THINK\]|◁{0}think▷|<\|(?:START|END)_THINKING\|>)"
_OPENED = re.compile(_MARK.format("") + r"\s*(?:" + _MARK.format("/") + r"\s*)?$")


@dataclass(frozen=True, slots=True)
class Turn:
    """A conversation through the end token of one turn.

    Attributes:
        text: The text.
        begin: Where in it the turn begins.
        asked: Whether that is where the template's generation prompt ends.
    """

    text: str
    begin: int
    asked: bool = True


def turn_of(conversation: Conversation, template: ChatTemplate, at: int, prompt: str, whole: str) -> Turn | RowError:
    """Message `at` as a turn, or why it cannot be aligned.

    Args:
        conversation: The conversation.
        template: What writes it.
        at: Which message.
        prompt: What the model is given when it is asked for the message.
        whole: The conversation through the message.

    Raises:
        RowError: the template writes only part of the message.
    """
    message = conversation.messages[at]
    opened = _OPENED.search(prompt)
    header_end = opened.start() if opened else len(prompt)
    if opened and not _holds(whole, message):
        whole = _with_reasoning(conversation, template, at, opened.group()) or whole
    begin, context = _border(conversation, template, at, prompt, whole), prompt
    if begin is None and opened and whole.startswith(prompt[:header_end]):
        begin, context = header_end, prompt[:header_end]
    if begin is None:
        return _unaligned(prompt, whole, at)
    answer = whole[begin:].removesuffix(template.suffix).rstrip()
    check_complete(message, prompt[header_end : len(context)] + answer, at)
    if not answer.strip():
        raise RowError(f"the chat template writes nothing for message {at + 1}, not even an end token")
    return Turn(context + answer + closer_of(conversation, template, at, answer), len(context), context == prompt)


def _border(conversation: Conversation, template: ChatTemplate, at: int, prompt: str, whole: str) -> int | None:
    """Where in `whole` the answer begins that was asked for with `prompt`; None where there is no telling."""
    if whole.startswith(prompt):
        return len(prompt)
    before = conversation.messages[:at]
    context = template.before_answer(before, conversation.tools)
    written = context if prompt[-1:].isspace() else context.rstrip()
    if whole.startswith(written) and _same_question(prompt, written, before):
        return len(written)
    for question in _written_forms(before):
        place, tail = context.rfind(question), prompt[prompt.rfind(question) :]
        if place >= 0 and question in prompt and whole.startswith(context[:place] + tail):
            return place + len(tail)
    return None


def _same_question(prompt: str, context: str, before: Sequence[Message]) -> bool:
    """Whether a prompt and the same context as it is written once it is answered agree from the last message on.

    Mistral's templates write the system message into the last question only while that is unanswered.
    """
    shared = first_difference(prompt[::-1], context[::-1])
    return any(question in prompt[len(prompt) - shared :] for question in _written_forms(before))


def _written_forms(before: Sequence[Message]) -> list[str]:
    """The last message's content as a template may write it: as it is, or as JSON."""
    content = before[-1].get("content", "").strip() if before else ""
    return [content, json.dumps(content), json.dumps(content, ensure_ascii=False)] if content else []


def _with_reasoning(conversation: Conversation, template: ChatTemplate, at: int, opened: str) -> str | None:
    """The conversation through a turn whose reasoning the template drops although it asks for it; None without any."""
    message = conversation.messages[at]
    content, reasoning = message.get("content", ""), message.get("reasoning_content")
    if message.get("tool_calls") or "/" in opened:
        return None
    if reasoning:
        content = opened + reasoning.strip("\n") + "\n" + opened.strip().replace("<", "</", 1) + "\n\n" + content
    elif opened.strip() not in content:
        return None
    return template.with_answer(conversation.messages[:at], conversation.tools, content)


def closer_of(conversation: Conversation, template: ChatTemplate, at: int, answer: str) -> str:
    """The mark of the next speaker, where a template closes its turns with nothing else."""
    if template.has_end(answer):
        return ""
    message, after = conversation.messages[at], conversation.messages[at + 1 : at + 2]
    called = bool(message.get("tool_calls"))
    role = after[0]["role"] if after else ("tool" if called else "user")
    return template.follower(role, after_call=called)


def check_complete(message: Message, written: str, at: int) -> None:
    """Refuse a message that the template writes only in part: the model would learn the rest away.

    Raises:
        RowError: names what is missing.
    """
    missing = _missing(written, message)
    if missing is not None:
        raise RowError(
            f"the chat template leaves out part of message {at + 1}: of {shortened(missing)} it writes "
            f"{shortened(written)}",
            "Give a chat template that writes reasoning and tool calls, or take them out of the rows.",
        )


def _holds(written: str, message: Message) -> bool:
    return _missing(written, message) is None


def _missing(written: str, message: Message) -> str | None:
    """The first part of a message that does not stand in a text; white space does not count."""
    wanted = [call["function"]["name"] for call in message.get("tool_calls", [])]
    wanted += [message[key] for key in ("content", "reasoning_content") if message.get(key)]
    packed = "".join(written.split())
    return next((part for part in wanted if "".join(part.split()) not in packed), None)


def _unaligned(prompt: str, whole: str, at: int) -> RowError:
    shared = first_difference(prompt, whole)
    begin = max(shared - 20, 0)
    return RowError(
        f"message {at + 1} cannot be aligned: the chat template asks for it with {shortened(prompt[begin:])} "
        f"but writes it as {shortened(whole[begin : shared + 40])}",
        "Give a chat template that writes an assistant's turn the way it asks for it.",
    )


def shortened(text: str) -> str:
    """A text for a message, cut in its middle if it is long."""
    return repr(text if len(text) <= 80 else f"{text[:50]} ... {text[-25:]}")
