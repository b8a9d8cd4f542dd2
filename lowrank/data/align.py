"""From characters to tokens: which tokens of a text make up the spans that carry loss.

Byte-level tokens may share a character (its bytes are split over several tokens, each with the character's offsets);
all of them carry loss when the character does. A token that lies on both sides of a border belongs to the prompt if the
prompt alone ends with that very token (tokens that swallow the white space behind them do); otherwise the row cannot be
aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from lowrank.data.rowerror import RowError
from lowrank.data.template import special_tokens
from lowrank.data.turns import Rendered, Span
from lowrank.errors import InputError

# Endings of prompts whose tokens are remembered: a template has few, text without special tokens many.
MOST_TAILS = 1000


class Encoder:
    """A tokenizer's fast backend without its post-processor, which adds special tokens and trims offsets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Copy the backend; the tokenizer itself is left as it is.

        Raises:
            InputError: the tokenizer has no fast backend, so tokens cannot be traced back to characters.
        """
        if not tokenizer.is_fast:
            raise InputError(
                f"the tokenizer {type(tokenizer).__name__} has no fast version, so the loss mask cannot be made exact",
                where="model.name_or_path",
                fix="Use a model whose folder holds a tokenizer.json.",
            )
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        self._backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._is_special = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=bool)
        self._is_special[list(special_tokens(tokenizer).values())] = True
        self._tails: dict[str, list[int]] = {}
        self.prefix = np.array(text_prefix(tokenizer), dtype=np.int32)

    def ids(self, text: str) -> np.ndarray:
        """Token ids of a text, nothing added, (n,) int32."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids (n,) int32 and character offsets (n, 2) int32 of each text."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            (
                np.array(encoding.ids, dtype=np.int32),
                np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(encoding)).reshape(-1, 2),
            )
            for encoding in encodings
        ]

    def supervised(self, rendered: Rendered, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Which tokens carry loss, (n,) bool.

        Args:
            rendered: The text and its spans.
            ids: Its token ids, (n,).
            offsets: Their first and one-past-last character, (n, 2).

        Raises:
            RowError: a token lies on both sides of a border.
        """
        begins, ends = offsets[:, 0], offsets[:, 1]
        mask = np.zeros(len(ids), dtype=bool)
        for span in rendered.spans:
            inside = (begins >= span.begin) & (begins < span.end)
            crossing = np.flatnonzero((begins < span.begin) & (ends > span.begin) | inside & (ends > span.limit))
            for token in crossing:
                self._settle(rendered.text, span, ids, int(token), offsets[token])
            mask |= inside
        return mask

    def is_uneven(self, rendered: Rendered, ids: np.ndarray, offsets: np.ndarray) -> bool:
        """Whether a prompt by itself is cut into other tokens than when its answer follows.

        Some tokenizers look ahead: two line breaks at the end of a text are one token, before a word they are two. Then
        the model is trained behind other tokens than it is asked with; a template whose header ends with a special
        token or one line break avoids that. Only what stands behind the last special token can differ.
        """
        special = np.flatnonzero(self._is_special[ids])
        for span in rendered.spans:
            first = int(np.searchsorted(offsets[:, 0], span.begin))
            before = special[np.searchsorted(special, first) - 1] if len(special) and special[0] < first else -1
            tail = rendered.text[offsets[before, 1] if before >= 0 else 0 : span.begin]
            if tail not in self._tails:
                self._tails = {} if len(self._tails) > MOST_TAILS else self._tails
                self._tails[tail] = self.ids(tail).tolist()
            if self._tails[tail] != ids[before + 1 : first].tolist():
                return True
        return False

    def _settle(self, text: str, span: Span, ids: np.ndarray, token: int, offset: np.ndarray) -> None:
        begin, end = int(offset[0]), int(offset[1])
        if begin < span.begin and np.array_equal(self.ids(text[: span.begin]), ids[: token + 1]):
            return
        border = span.begin if begin < span.begin else span.limit
        raise RowError(
            f"the token {text[begin:end]!r} lies on both sides of the border between "
            f"{text[max(border - 20, 0) : border]!r} and {text[border : border + 20]!r}",
            "Move white space away from where an answer begins or ends.",
        )


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text: mostly the BOS token, or nothing."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    at = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
    return full[:at]
