"""A tokenizer's chat template as text: whole conversations, and prompts that end where the assistant begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lowrank.data.conversation import Message
from lowrank.data.rowerror import RowError

# Two answers that share no beginning: what their renderings share is what stands before an answer.
_PROBES = ("Yes", "No")


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


class ChatTemplate:
    """Renders conversations with the tokenizer's own chat template, the way `apply_chat_template` does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = special_pattern(tokenizer)
        self._headers: dict[tuple[str, bool], str] = {}

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
            next(texts) + self._header(messages, tools) if messages else self._missing_header(messages, tools)
            for messages in conversations
        ]

    def _header(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        key = (messages[-1]["role"], tools is not None)
        if key not in self._headers:
            self._headers[key] = self._missing_header(messages, tools)
        return self._headers[key]

    def before_answer(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        """What stands before an answer to `messages` when the answer is there: the shared part of two renderings.

        Mostly this is `prompt`; it differs where the template writes a question otherwise once it is answered.
        """
        answered = self.render([[*messages, {"role": "assistant", "content": probe}] for probe in _PROBES], tools)
        return answered[0][: first_difference(*answered)]

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
        closed = ended[:shared].rstrip()
        has_end_token = any(match.end() == len(closed) for match in self._special.finditer(closed))
        return ended[shared:] if has_end_token else ""

    def _missing_header(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        """What `add_generation_prompt` leaves out of the header of an answer to such messages; mostly nothing."""
        without = self.render([messages], tools)[0] if messages else ""
        if messages and self._apply([messages], tools, add_generation_prompt=True) != [without]:
            return ""
        shared = self.before_answer(messages, tools)
        header = shared[len(without) :] if shared.startswith(without) else ""
        return header if header.strip() else ""

    def _apply(
        self, conversations: Sequence[Sequence[Message]], tools: list[Any] | None, *, add_generation_prompt: bool
    ) -> list[str]:
        try:
            texts = self._tokenizer.apply_chat_template(
                [list(messages) for messages in conversations],
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from None
        assert isinstance(texts, list)
        return [str(text) for text in texts]
