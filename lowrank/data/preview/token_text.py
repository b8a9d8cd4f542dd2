"""Tokens as pieces of text that a person can read, each with its mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# Bytes of one character may lie in so many tokens; what is not a character by then never becomes one.
MOST_TOKENS_PER_CHARACTER = 4
BROKEN = "\ufffd"
# U+2400 and on are pictures of the control characters U+0000 to U+001F, U+2421 is that of U+007F.
PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) != "\n"} | {0x7F: 0x2421}


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of one token, or of several that share the bytes of a character, and whether it carries loss."""

    text: str
    supervised: bool


def visible(text: str) -> str:
    """The text with its control characters, line breaks excepted, as the pictures that Unicode has for them.

    A terminal would obey or swallow them, and a page leave them out.
    """
    return text.translate(PICTURES)


def pieces(ids: Sequence[int], supervised: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """An example token by token; the texts put together are the example's text.

    Args:
        ids: Token ids, (n,).
        supervised: Which of them carry loss, (n,).
        tokenizer: What they mean.
    """
    anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    before = str(tokenizer.decode(anchor))
    known: dict[tuple[int, ...], str] = {}

    def text_of(tokens: tuple[int, ...]) -> str:
        # Behind another token, because a first token loses the space before its word in some tokenizers.
        if tokens not in known:
            text = str(tokenizer.decode([*anchor, *tokens], clean_up_tokenization_spaces=False))
            known[tokens] = text.removeprefix(before)
        return known[tokens]

    found: list[Piece] = []
    waiting: tuple[int, ...] = ()
    for token, mark in zip(ids, supervised, strict=True):
        waiting = (*waiting, token)
        text = text_of(waiting)
        if BROKEN not in text or len(waiting) == MOST_TOKENS_PER_CHARACTER:
            found.append(Piece(text, mark))
            waiting = ()
    if waiting:
        found.append(Piece(text_of(waiting), supervised[-1]))
    return found
