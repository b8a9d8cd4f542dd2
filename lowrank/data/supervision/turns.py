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

from lowrank.data.reading.conversation import Conversation
from lowrank.data.reading.row_error import RowError
from lowrank.data.supervision.template import ChatTemplate
from lowrank.data.supervision.turn import Turn, check_complete, closer_of, shortened, turn_of


@dataclass(frozen=True, slots=True)
class Span:
    """Characters begin ... end of a text carry loss; a token may run on to `limit` (white space behind the end)."""

    begin: int
    end: int
    limit: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text to tokenise as it stands.

    Attributes:
        text: The text.
        spans: Its stretches that carry loss, in order and apart.
        unasked: How many of them do not begin where the template's generation prompt ends.
    """

    text: str
    spans: list[Span]
    unasked: int = 0


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """The texts of a row.

    Attributes:
        texts: One or more; none where nothing carries loss.
        masked: How many of its turns are in none of them although they were to carry loss.
        all_marked: Whether the row itself says of every turn that it carries no loss.
    """

    texts: list[Rendered]
    masked: int = 0
    all_marked: bool = False


def _trained_turns(conversation: Conversation, train_on: str) -> list[int]:
    """The messages that carry loss under `assistant`, `last_assistant` or `completion`, by index.

    There is none where the row says of all of them that they carry no loss.

    Raises:
        RowError: there is no turn to ask for.
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
    if not turns:
        raise RowError(
            f"no assistant turn is left to train on under train_on: {train_on}",
            "None follows the prompt: remove the row, or take train_on: assistant.",
        )
    return [at for at in turns if conversation.train[at]]


def _completion_from(conversation: Conversation) -> int:
    if conversation.completion_from is not None:
        return conversation.completion_from
    users = [at for at, message in enumerate(conversation.messages) if message["role"] == "user"]
    return users[-1] + 1 if users else 0


def render_turns(conversation: Conversation, template: ChatTemplate, train_on: str) -> RenderedRow:
    """The texts of a conversation that train every turn asked for, each in the context in which it would be generated.

    That is one text, unless the template rewrites earlier turns (drops their reasoning, moves the system message into
    the last question ...). Then the turns that a later rendering changes get a text of their own that ends with them.
    A turn that the template asks for in one way and writes in another, so that there is no telling where it begins,
    carries no loss; nor does one that it refuses to write by itself.

    Raises:
        RowError: no turn to learn from.
    """
    if train_on == "all":
        all_marked = not any(conversation.train)
        return RenderedRow([] if all_marked else [_everything(conversation, template)], all_marked=all_marked)
    asked = _trained_turns(conversation, train_on)
    if not asked:
        return RenderedRow([], all_marked=True)
    written, text = _asked(conversation, template, asked)
    _check_tools(conversation.tools, next(each[0] for each in written.values() if not isinstance(each, RowError)))
    found = {
        at: each if isinstance(each, RowError) else turn_of(conversation, template, at, *each)
        for at, each in written.items()
    }
    todo = {at: turn for at, turn in found.items() if isinstance(turn, Turn)}
    if not todo:
        raise next(problem for problem in found.values() if isinstance(problem, RowError))
    return RenderedRow(_texts(todo, text), masked=len(found) - len(todo))


def _asked(
    conversation: Conversation, template: ChatTemplate, asked: Sequence[int]
) -> tuple[dict[int, tuple[str, str] | RowError], str]:
    """For each message asked for, its prompt and the conversation through it; and the whole conversation.

    A template may refuse to write a message where a whole conversation ends with it (a greeting before any question).

    Raises:
        RowError: the template refuses the conversation, or every message.
    """
    messages, tools = conversation.messages, conversation.tools
    try:
        prompts = template.prompts([messages[:at] for at in asked], tools)
        throughs = [messages[: at + 1] for at in asked if at + 1 < len(messages)]
        *wholes, text = template.render([*throughs, messages], tools)
        return dict(zip(asked, zip(prompts, [*wholes, text], strict=False), strict=True)), text
    except RowError:
        if len(asked) == 1:
            raise
    found: dict[int, tuple[str, str] | RowError] = {}
    for at in asked:
        try:
            found |= _asked(conversation, template, [at])[0]
        except RowError as refused:
            found[at] = refused
    refusals = [each for each in found.values() if isinstance(each, RowError)]
    if len(refusals) == len(asked):
        raise refusals[0]
    return found, template.render([messages], tools)[0]


def _texts(todo: dict[int, Turn], text: str) -> list[Rendered]:
    """As few texts as hold all turns, beginning with the whole conversation's."""
    last = next(reversed(todo.values())).text
    text = last if last.startswith(text.rstrip()) and len(last) > len(text.rstrip()) else text
    texts = []
    while todo:
        within = {at: turn for at, turn in todo.items() if text.startswith(turn.text)}
        if within:
            spans = [Span(turn.begin, len(turn.text), _end_of_white(text, len(turn.text))) for turn in within.values()]
            texts.append(Rendered(text, spans, unasked=sum(not turn.asked for turn in within.values())))
        todo = {at: turn for at, turn in todo.items() if at not in within}
        text = next(reversed(todo.values())).text if todo else text
    return texts[::-1]


def _check_tools(tools: list[Any] | None, prompt: str) -> None:
    for tool in tools or []:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise RowError(f"a tool without a function name: {shortened(str(tool))}")
        if name not in prompt:
            raise RowError(
                f"the chat template does not tell the model about the tool {name!r}",
                "Give a chat template with tools, or take the tools out of the rows.",
            )


def _end_of_white(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip())


def _everything(conversation: Conversation, template: ChatTemplate) -> Rendered:
    """The whole text carries loss, but for messages marked `"train": false`."""
    messages, tools = conversation.messages, conversation.tools
    text = template.render([messages], tools)[0]
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            check_complete(message, text, at)
    if messages[-1]["role"] == "assistant":
        closer = closer_of(conversation, template, len(messages) - 1, text)
        text = text.rstrip() + closer if closer else text
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
