"""A tokenizer's chat template as text: whole conversations, and prompts that end where the assistant begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lowrank.data.reading.messages import REASONING, Message
from lowrank.data.reading.row_error import RowError
from lowrank.data.supervision.tool_calls import FORMS, CallForm, is_whole, probe_call

# Two answers that share no beginning: what their renderings share is what stands before an answer.
_PROBES = ("Yes", "No")
# What a template reads of a message: message.content, message["content"], message.get("content").
_ATTRIBUTE = re.compile(r"(?:\.(?!get\b)|\[\s*['\"]|get\(\s*['\"])(\w+)")
_TODAY = re.compile(r"strftime_now\(\s*(['\"])(?P<format>[^'\"]*)\1\s*\)")


def first_difference(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every special token of a tokenizer and its id: the named ones, and all that it marks as special."""
    marked = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return marked | dict(named)


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds special tokens in a text."""
    longest_first = sorted(special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes today's date, as Llama 3.2's and gpt-oss' do."""
    return "strftime_now" in str(tokenizer.chat_template)


class ChatTemplate:
    """Renders conversations with the tokenizer's own chat template, the way `apply_chat_template` does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: str | None = None) -> None:
        """Take a tokenizer's template.

        Args:
            tokenizer: Its owner.
            today: The date (2026-11-26) that a template writes which writes the day's; None: the day it is.
        """
        self._tokenizer = tokenizer
        self._today = date.today() if today is None else date.fromisoformat(today)
        self._special = special_pattern(tokenizer)
        self._headers: dict[tuple[str, bool], str] = {}
        self._followers: dict[tuple[str, bool], str] = {}
        self._dated_by_tools: dict[bool, str] = {}

    def render(self, conversations: Sequence[Sequence[Message]], tools: list[Any] | None) -> list[str]:
        """The text of each conversation.

        Raises:
            RowError: the template refuses a conversation.
        """
        return self._apply(conversations, tools, add_generation_prompt=False)

    def prompts(self, conversations: Sequence[Sequence[Message]], tools: list[Any] | None) -> list[str]:
        """The text of each conversation up to where the assistant's next message begins, its header included.

        Where the template has no generation prompt (it ignores `add_generation_prompt`, or writes none after this role)
        the header is what the renderings of two different answers have in common. White space alone is no header: it
        belongs to the answer (Mistral's older templates write one space before it).

        Raises:
            RowError: the template refuses a conversation.
        """
        begun = [messages for messages in conversations if messages]
        texts = iter(self._apply(begun, tools, add_generation_prompt=True) if begun else [])
        return [
            next(texts) + self._header(messages, tools) if messages else self.missing_header(messages, tools)
            for messages in conversations
        ]

    def _header(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        key = (messages[-1]["role"], tools is not None)
        if key not in self._headers:
            self._headers[key] = self.missing_header(messages, tools)
        return self._headers[key]

    def before_answer(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        """What stands before an answer to `messages` when the answer is there: the shared part of two renderings.

        Mostly this is `prompt`; it differs where the template writes a question otherwise once it is answered.
        """
        answered = self._probed(messages, tools)
        return answered[0][: first_difference(*answered)]

    def with_answer(self, messages: Sequence[Message], tools: list[Any] | None, answer: str) -> str:
        """The conversation with an answer in it that the template does not get to see, and so cannot change."""
        text = self._probed(messages, tools)[0]
        begin = len(self.before_answer(messages, tools))
        return text[:begin] + answer + text[begin + len(_PROBES[0]) :]

    def _probed(self, messages: Sequence[Message], tools: list[Any] | None) -> list[str]:
        return self.render([[*messages, {"role": "assistant", "content": probe}] for probe in _PROBES], tools)

    @cached_property
    def suffix(self) -> str:
        """What the template writes at the end of a whole conversation, behind the end token of its last turn.

        Phi-3 closes every turn with `<|end|>` and the conversation with `<|endoftext|>`; most templates write nothing.
        """
        question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBES[0]}
        try:
            ended, going_on = self.render([[question, answer], [question, answer, question]], None)
        except RowError:
            return ""
        shared = first_difference(ended, going_on)
        for text in (ended, going_on):
            shared = next((m.start() for m in self._special.finditer(text) if m.start() < shared < m.end()), shared)
        return ended[shared:] if self.has_end(ended[:shared]) else ""

    def has_end(self, text: str) -> bool:
        """Whether a text ends with a special token; white space behind it does not count."""
        closed = text.rstrip()
        return any(match.end() == len(closed) for match in self._special.finditer(closed))

    @cached_property
    def end_of_turn(self) -> str:
        """The special token that closes an answer, or that begins what follows it; empty where there is none.

        Raises:
            RowError: the template refuses a question and its answer.
        """
        question = [{"role": "user", "content": "Hi"}]
        behind = self.with_answer(question, None, "")[len(self.before_answer(question, None)) :]
        mark = self._special.match(behind.lstrip())
        return mark.group() if mark is not None else self.follower("user", after_call=False)

    def follower(self, role: str, *, after_call: bool) -> str:
        """The special token that begins a message of `role` behind an answer (a tool call), if anything does at once.

        GLM's templates close no turn: the mark of the next speaker is what ends an answer.
        """
        key = (role, after_call)
        if key not in self._followers:
            said = {"content": _PROBES[0]} if not after_call else {"tool_calls": [probe_call()]}
            begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", **said}]
            try:
                closed, going_on = self.render([begun, [*begun, {"role": role, "content": "Hi"}]], None)
            except RowError:
                closed, going_on = "", ""
            at_once = going_on.startswith(closed) and not closed[-1:].isspace()
            follows = self._special.match(going_on, len(closed)) if at_once else None
            known = follows is not None and follows.group() != self._tokenizer.bos_token
            self._followers[key] = follows.group() if follows is not None and known else ""
        return self._followers[key]

    def missing_header(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        """What `add_generation_prompt` leaves out of the header of an answer to such messages; mostly nothing."""
        without = self.render([messages], tools)[0] if messages else ""
        if messages and self._apply([messages], tools, add_generation_prompt=True) != [without]:
            return ""
        shared = self.before_answer(messages, tools)
        header = shared[len(without) :] if shared.startswith(without) else ""
        return header if header.strip() else ""

    @cached_property
    def _call_form(self) -> CallForm:
        """How this template wants tool calls: the first form that it writes whole, or else the first that it takes."""
        taken = []
        for form in FORMS:
            begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [probe_call()]}]
            try:
                text = self._applied([form.written(begun)], None, add_generation_prompt=False)[0]
            except RowError:
                continue
            if is_whole(text):
                return form
            taken.append(form)
        return (taken or FORMS)[0]

    def _apply(
        self, conversations: Sequence[Sequence[Message]], tools: list[Any] | None, *, add_generation_prompt: bool
    ) -> list[str]:
        called = any(message.get("tool_calls") for messages in conversations for message in messages)
        formed = [self._call_form.written(messages) for messages in conversations] if called else conversations
        written = [[self._as_read(message, tools) for message in messages] for messages in formed]
        return self._applied(written, tools, add_generation_prompt=add_generation_prompt)

    def _as_read(self, message: Message, tools: list[Any] | None) -> Message:
        """A message with its reasoning under the name that the template reads."""
        if "reasoning_content" not in message:
            return message
        read = set(_ATTRIBUTE.findall(self._dated(tools is not None)))
        name = next((name for name in REASONING if name in read), "reasoning_content")
        return {(name if key == "reasoning_content" else key): value for key, value in message.items()}

    def _applied(
        self, conversations: Sequence[Sequence[Message]], tools: list[Any] | None, *, add_generation_prompt: bool
    ) -> list[str]:
        try:
            texts = self._tokenizer.apply_chat_template(
                [list(messages) for messages in conversations],
                tools=tools,
                chat_template=self._dated(tools is not None),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from None
        assert isinstance(texts, list)
        return [str(text) for text in texts]

    def _dated(self, with_tools: bool) -> str:
        """The template with the date in the place of the calls that ask for it."""
        if with_tools not in self._dated_by_tools:
            template = self._tokenizer.get_chat_template(tools=[] if with_tools else None)
            self._dated_by_tools[with_tools] = _TODAY.sub(
                lambda call: repr(self._today.strftime(call["format"])), template
            )
        return self._dated_by_tools[with_tools]
