"""From characters to tokens: which tokens of a text make up the spans that carry loss.

Byte-level tokens may share a character (its bytes are split over several tokens, each with the character's offsets);
all of them carry loss when the character does. A token that lies on both sides of a border belongs to the prompt if the
prompt alone ends with that very token (tokens that swallow the white space behind them do).

A model that is asked sees the prompt's tokens and then those of its answer. Where a text as a whole is cut otherwise at
a border, prompt and answer are encoded apart, as they are then:

    whole    Answer :  yes          apart    Answer : ␣ | yes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from lowrank.data.reading.row_error import RowError
from lowrank.data.supervision.template import special_tokens
from lowrank.data.supervision.turns import Rendered
from lowrank.errors import InputError

# Endings of prompts whose tokens are remembered: a template has few, text without special tokens many.
MOST_TAILS = 1000


# Put before a piece from the middle of a text, and taken away again: tokenizers add a space before a text of its own.
ANCHORS = ("\n", "a", ".")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text as tokens.

    Attributes:
        ids: Token ids, (n,) int32.
        supervised: Which of them carry loss, (n,) bool.
        apart: Whether a prompt and its answer had to be encoded apart.
    """

    ids: np.ndarray
    supervised: np.ndarray
    apart: bool


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
        self._adds_space = not np.array_equal(self.ids("\na")[-1:], self.ids("a"))
        self.prefix = np.array(_text_prefix(tokenizer), dtype=np.int32)

    def ids(self, text: str) -> np.ndarray:
        """Token ids of a text, nothing added, (n,) int32."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids (n,) int32 and character offsets (n, 2) int32 of each text."""
        return [_arrays(encoding) for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def encoded(self, rendered: Rendered, ids: np.ndarray, offsets: np.ndarray) -> Encoded:
        """A text's tokens and which of them carry loss.

        Args:
            rendered: The text and its spans.
            ids: Its token ids as a whole, (n,).
            offsets: Their first and one-past-last character, (n, 2).

        Raises:
            RowError: a token lies on both sides of a border, and the two sides cannot be encoded apart.
        """
        cuts = self._cuts(rendered, ids, offsets)
        if cuts:
            ids, offsets = self._in_pieces(rendered.text, cuts)
        begins = offsets[:, 0]
        mask = np.zeros(len(ids), dtype=bool)
        for span in rendered.spans:
            mask |= (begins >= span.begin) & (begins < span.end)
        return Encoded(ids, mask, apart=bool(cuts))

    def _cuts(self, rendered: Rendered, ids: np.ndarray, offsets: np.ndarray) -> list[int]:
        """The characters at which a text has to be encoded apart; mostly none."""
        begins, ends = offsets[:, 0], offsets[:, 1]
        cuts: set[int] = set()
        for span in rendered.spans:
            crossing = np.flatnonzero((begins < span.begin) & (ends > span.begin))
            if len(crossing):
                whole = all(self._ends_with(rendered.text[: span.begin], ids[: token + 1]) for token in crossing)
                cuts |= set() if whole else {span.begin}
            elif self._is_uneven(rendered.text, span.begin, ids, offsets):
                cuts.add(span.begin)
            if ((begins >= span.begin) & (begins < span.end) & (ends > span.limit)).any():
                cuts.add(span.end)
        return sorted(cuts - {0, len(rendered.text)})

    def _ends_with(self, prompt: str, ids: np.ndarray) -> bool:
        return np.array_equal(self.ids(prompt), ids)

    def _is_uneven(self, text: str, border: int, ids: np.ndarray, offsets: np.ndarray) -> bool:
        """Whether a prompt by itself is cut into other tokens than when its answer follows.

        Some tokenizers look ahead: two line breaks at the end of a text are one token, before a word they are two. Only
        what stands behind the last special token can differ.
        """
        special = np.flatnonzero(self._is_special[ids])
        first = int(np.searchsorted(offsets[:, 0], border))
        before = int(special[np.searchsorted(special, first) - 1]) if len(special) and special[0] < first else 0
        tail = text[offsets[before, 0] if before < len(ids) else 0 : border]
        if tail not in self._tails:
            self._tails = {} if len(self._tails) > MOST_TAILS else self._tails
            self._tails[tail] = self.ids(tail).tolist()
        return self._tails[tail] != ids[before:first].tolist()

    def _in_pieces(self, text: str, cuts: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n,) and offsets (n, 2) of a text that is encoded piece by piece."""
        edges = [0, *cuts, len(text)]
        parts = [_arrays(self._backend.encode(text[: cuts[0]], add_special_tokens=False))]
        parts += [self._continued(text, begin, end) for begin, end in pairwise(edges[1:])]
        shifts = zip(parts, edges, strict=False)
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([at + begin for (_, at), begin in shifts])

    def _continued(self, text: str, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """A piece of a text as it is encoded in the middle of one."""
        piece = text[begin:end]
        if not self._adds_space:
            return _arrays(self._backend.encode(piece, add_special_tokens=False))
        for anchor in ANCHORS:
            ids, offsets = _arrays(self._backend.encode(anchor + piece, add_special_tokens=False))
            first = int(np.searchsorted(offsets[:, 0], len(anchor)))
            if self._ends_with(anchor, ids[:first]) and (offsets[:first, 1] <= len(anchor)).all():
                return ids[first:], offsets[first:] - len(anchor)
        raise RowError(
            f"what stands on both sides of the border between {text[max(begin - 20, 0) : begin]!r} and "
            f"{text[begin : begin + 20]!r} cannot be encoded apart",
            "Move white space away from where an answer begins or ends.",
        )


def _arrays(encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(encoding))
    return np.array(encoding.ids, dtype=np.int32), offsets.reshape(-1, 2)


def _text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text: mostly the BOS token, or nothing."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    at = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
    return full[:at]
