"""Which stretches of a row's text carry loss: the exact borders of every trained turn, from rendering turn by turn.

    text   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
           |------------ prompt of the turn ------------------|
                                                              |-- trained --|
                                                              begin       end  limit

`prompt` is what the model is given when it is asked for that turn, so what follows it, through the end-of-turn token,
is what the model has to say. White space that the template writes behind the end token is not learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.data.conversation import Conversation, Message
from lowrank.data.rowerror import RowError
from lowrank.data.template import ChatTemplate, first_difference

TRAIN_ON = ("assistant", "last_assistant", "completion", "all")


@dataclass(frozen=True, slots=True)
class Span:
    """Characters begin ... end of a text carry loss; a token may run on to `limit` (white space behind the end)."""

    begin: int
    end: int
    limit: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text to tokenise as it stands, and the spans of it that carry loss, in order and apart."""

    text: str
    spans: list[Span]


def trained_turns(conversation: Conversation, train_on: str) -> list[int]:
    """The messages that carry loss under `assistant`, `last_assistant` or `completion`, by index.

    Raises:
        RowError: there is none.
    """
    messages = conversation.messages
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        roles = ", ".join(message["role"] for message in messages)
        raise RowError(f"the conversation has no assistant turn to learn from (its roles: {roles})")
    if train_on == "last_assistant":
        turns = turns[-1:]
    elif train_on == "completion" or conversation.completion_from is not None:
        turns = [at for at in turns if at >= _completion_from(conversation)]
    turns = [at for at in turns if conversation.train[at]]
    if not turns:
        raise RowError(
            f"no assistant turn is left to train on under train_on: {train_on}",
            'Every such turn says "train": false, or none follows the prompt: remove the row or the mark.',
        )
    return turns


def _completion_from(conversation: Conversation) -> int:
    if conversation.completion_from is not None:
        return conversation.completion_from
    users = [at for at, message in enumerate(conversation.messages) if message["role"] == "user"]
    return users[-1] + 1 if users else 0


def render_turns(conversation: Conversation, template: ChatTemplate, train_on: str) -> list[Rendered]:
    """The texts of a conversation that train every turn asked for, each in the context in which it would be generated.

    That is one text, unless the template rewrites earlier turns (drops their reasoning, moves the system message into
    the last question ...). Then the turns that a later rendering changes get a text of their own that ends with them.

    Raises:
        RowError: no turn to learn from, or a turn does not begin with the template's own generation prompt.
    """
    if train_on == "all":
        return [_everything(conversation, template)]
    messages, tools = conversation.messages, conversation.tools
    asked = trained_turns(conversation, train_on)
    prompts = template.prompts([messages[:at] for at in asked], tools)
    *wholes, text = template.render([*(messages[: at + 1] for at in asked if at + 1 < len(messages)), messages], tools)
    _check_tools(tools, prompts[0])
    todo = {
        at: _turn(conversation, template, at, prompt, whole)
        for at, prompt, whole in zip(asked, prompts, [*wholes, text], strict=False)
    }
    texts = []
    while todo:
        within = {at: turn for at, turn in todo.items() if text.startswith(turn.text)}
        if within:
            spans = [Span(turn.begin, len(turn.text), _end_of_white(text, len(turn.text))) for turn in within.values()]
            texts.append(Rendered(text, spans))
        todo = {at: turn for at, turn in todo.items() if at not in within}
        text = next(reversed(todo.values())).text if todo else text
    return texts[::-1]


@dataclass(frozen=True, slots=True)
class _Turn:
    """A conversation through the end token of one turn, and where in it that turn begins."""

    text: str
    begin: int


def _turn(conversation: Conversation, template: ChatTemplate, at: int, prompt: str, whole: str) -> _Turn:
    """What the model is given when it is asked for message `at`, and what it has to say then."""
    begin = len(prompt)
    if not whole.startswith(prompt):
        before = conversation.messages[:at]
        context = template.before_answer(before, conversation.tools)
        context = context if prompt[-1:].isspace() else context.rstrip()
        if not whole.startswith(context) or not _same_question(prompt, context, before):
            raise _unaligned(prompt, whole, at)
        begin = len(context)
    answer = whole[begin:].removesuffix(template.suffix).rstrip()
    _check_complete(conversation.messages[at], answer, at)
    return _Turn(prompt + answer, len(prompt))


def _same_question(prompt: str, context: str, before: Sequence[Message]) -> bool:
    """Whether a prompt and the same context as it is written once it is answered agree from the last message on.

    Mistral's templates write the system message into the last question only while that is unanswered.
    """
    shared = first_difference(prompt[::-1], context[::-1])
    question = before[-1].get("content", "").strip() if before else ""
    return bool(question) and question in prompt[len(prompt) - shared :]


def _unaligned(prompt: str, whole: str, at: int) -> RowError:
    shared = first_difference(prompt, whole)
    begin = max(shared - 20, 0)
    return RowError(
        f"message {at + 1} cannot be aligned: the chat template asks for it with {_short(prompt[begin:])} "
        f"but writes it as {_short(whole[begin : shared + 40])}",
        "Give a chat template that writes an assistant's turn the way it asks for it.",
    )


def _check_tools(tools: list[Any] | None, prompt: str) -> None:
    for tool in tools or []:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise RowError(f"a tool without a function name: {_short(str(tool))}")
        if name not in prompt:
            raise RowError(
                f"the chat template does not tell the model about the tool {name!r}",
                "Give a chat template with tools, or take the tools out of the rows.",
            )


def _check_complete(message: Message, turn: str, at: int) -> None:
    """Refuse a turn that the template writes only in part: the model would learn the rest away."""
    wanted = [call["function"]["name"] for call in message.get("tool_calls", [])]
    wanted += [message[key] for key in ("content", "reasoning_content") if message.get(key)]
    for part in wanted:
        if part.strip() not in turn and "".join(part.split()) not in "".join(turn.split()):
            raise RowError(
                f"the chat template leaves out part of message {at + 1}: of {_short(part)} it writes {_short(turn)}",
                "Give a chat template that writes reasoning and tool calls, or take them out of the rows.",
            )
    if not turn.strip():
        raise RowError(f"the chat template writes nothing for message {at + 1}, not even an end token")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:50]} ... {text[-25:]}")


def _end_of_white(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip())


def _everything(conversation: Conversation, template: ChatTemplate) -> Rendered:
    """The whole text carries loss, but for messages marked `"train": false`."""
    messages, tools = conversation.messages, conversation.tools
    text = template.render([messages], tools)[0]
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            _check_complete(message, text, at)
    if all(conversation.train):
        return Rendered(text, [Span(0, len(text), len(text))])
    return Rendered(text, _marked_spans(conversation, template, text))


def _marked_spans(conversation: Conversation, template: ChatTemplate, text: str) -> list[Span]:
    befores = template.render(
        [conversation.messages[:at] for at in range(1, len(conversation.messages))], conversation.tools
    )
    edges = [0]
    for before in befores:
        closed = before.removesuffix(template.suffix)
        if not text.startswith(closed):
            raise RowError(
                f'message {len(edges) + 1} cannot be aligned for "train": false: the chat template rewrites what is '
                "before it",
                "Use data.train_on: assistant for such rows.",
            )
        edges.append(len(closed))
    edges.append(len(text))
    marks = zip(edges, edges[1:], conversation.train, strict=False)
    return [Span(begin, end, end) for begin, end, trained in marks if trained and end > begin]


def plain_text(prompt: str, completion: str, end_token: str, train_on: str) -> Rendered:
    """A prompt and its completion as they stand, ended by the tokenizer's end token; under `all` both carry loss."""
    text = prompt + completion
    text += "" if text.endswith(end_token) else end_token
    return Rendered(text, [Span(0 if train_on == "all" else len(prompt), len(text), len(text))])
