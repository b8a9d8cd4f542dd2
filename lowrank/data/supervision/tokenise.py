"""From rows to tokens: one chunk of rows becomes flat arrays, wherever it is worked on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lowrank.data.examples.example import IdsAndMask
from lowrank.data.examples.token_table import Cut, Outcome, TokenTable
from lowrank.data.reading.conversation import Conversation, Plain, Preference
from lowrank.data.reading.formats import is_blank, read_row
from lowrank.data.reading.row_error import RowError
from lowrank.data.reading.rows import Row, as_json
from lowrank.data.reading.sources import Joined
from lowrank.data.supervision.align import Encoder
from lowrank.data.supervision.choose_template import fitting_templates
from lowrank.data.supervision.row_options import Options
from lowrank.data.supervision.template import ChatTemplate, special_pattern
from lowrank.data.supervision.turns import Rendered, RenderedRow, plain_text, render_turns
from lowrank.errors import InputError


@dataclass(slots=True)
class _Chunk:
    """What has come out of the rows so far, in lists that become a `TokenTable`."""

    ids: list[np.ndarray] = field(default_factory=list)
    supervised: list[np.ndarray] = field(default_factory=list)
    example_rows: list[int] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)

    def add(self, row: int, ids: np.ndarray, supervised: np.ndarray, cut: Cut) -> None:
        self.ids.append(ids)
        self.supervised.append(supervised)
        self.example_rows.append(row)
        self.cuts.append(cut)
        self.digests.append(_digest(ids.tobytes() + supervised.tobytes()))


class Tokeniser:
    """Turns rows into tokens and masks with one tokenizer and one set of options."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Options) -> None:
        self.options = options
        self._has_template = tokenizer.chat_template is not None
        self._template = ChatTemplate(tokenizer, options.today)
        self._encoder = Encoder(tokenizer)
        self._end_token = tokenizer.eos_token
        self._offer = f"Set data.chat_template: {', '.join(fitting_templates(tokenizer))} fit, or name a .jinja file."
        self._special = special_pattern(tokenizer)

    def table(self, rows: Joined, begin: int, end: int, faults: dict[int, InputError] | None = None) -> TokenTable:
        """Rows begin ... end as tokens; one that cannot be used gives none, and its outcome says so.

        Args:
            rows: The rows.
            begin: The first.
            end: One past the last.
            faults: Takes why each row that cannot be used cannot, by its number from `begin`.
        """
        noting = _Faults(rows, begin, {} if faults is None else faults)
        formats = rows.formats(begin, end)
        count = end - begin
        outcomes = np.full(count, Outcome.KEPT, dtype=np.uint8)
        texts: list[tuple[int, Rendered, bool]] = []
        keys, control = np.zeros(count, dtype=np.uint64), np.zeros(count, dtype=bool)
        masked, unasked = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)
        for at, row in enumerate(_each(rows, begin, end)):
            with noting.of(at):
                if isinstance(row, InputError):
                    raise row
                canonical = _canonical(row)
                control[at] = self._special.search(canonical) is not None
                keys[at] = _digest(_encoded(canonical))
                rendered, is_chat = self._rendered(row, formats[at])
                texts += [(at, text, is_chat) for text in rendered.texts]
                masked[at], unasked[at] = rendered.masked, any(text.unasked for text in rendered.texts)
                if not rendered.texts:
                    outcomes[at] = Outcome.MARKED if rendered.all_marked else Outcome.EMPTY
        lengths, uneven = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)
        encoded = self._encoder.batch([text.text for _, text, _ in texts])
        ready: list[tuple[int, np.ndarray, np.ndarray, bool]] = []
        for (at, text, is_chat), (ids, offsets) in zip(texts, encoded, strict=True):
            with noting.of(at):
                ids, mask, apart = self._masked(text, ids, offsets, is_chat=is_chat)
                uneven[at] |= apart
                lengths[at] = max(lengths[at], len(ids))
                ready.append((at, ids, mask, not is_chat and bool(mask[1:].all())))
        chunk = _Chunk()
        for at, ids, mask, is_text in ready:
            if at not in noting.faults and not self._fit(chunk, begin + at, ids, mask, is_text=is_text):
                outcomes[at] = Outcome.TOO_LONG
        outcomes[list(noting.faults)] = Outcome.BAD
        return _table(chunk, keys, outcomes, control, lengths, uneven, masked, unasked)

    def fault(self, rows: Joined, index: int) -> InputError:
        """Why a row cannot be used whose outcome says so."""
        faults: dict[int, InputError] = {}
        self.table(rows, index, index + 1, faults)
        return faults[0]

    def last_turn(self, row: Row, form: str) -> tuple[list[int], list[int]]:
        """The last turn that is trained (of a preference the chosen answer), whole: the tokens before it, and its own
        through the end token.

        Raises:
            RowError: the row cannot be used, or holds nothing to learn.
        """
        content = None if is_blank(row) else read_row(row, form, self._has_template)
        content = content.chosen if isinstance(content, Preference) else content
        if content is None or content.is_empty:
            raise RowError("the row is empty")
        rendered, is_chat = self._written(content)
        text = rendered.texts[-1]
        last = Rendered(text.text[: text.spans[-1].end], text.spans[-1:])
        ids, mask, _ = self._masked(last, *self._encoder.batch([last.text])[0], is_chat=is_chat)
        begin = int(mask.argmax())
        return ids[:begin].tolist(), ids[begin:].tolist()

    def answer(self, content: Conversation | Plain) -> IdsAndMask:
        """A prompt and its answer as tokens, through the one that ends it, and which of them are the answer's.

        Raises:
            RowError: the answer has no place of its own in what a chat template writes.
        """
        rendered, is_chat = self._written(content)
        if len(rendered.texts) != 1 or rendered.masked:
            raise RowError(
                "the chat template does not write the answer as one text that follows the prompt",
                "Take another data.chat_template, or let the answer be one message.",
            )
        text = rendered.texts[0]
        ids, mask, _ = self._masked(text, *self._encoder.batch([text.text])[0], is_chat=is_chat)
        end = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else len(ids)
        return ids[:end], mask[:end]

    def _masked(
        self, text: Rendered, ids: np.ndarray, offsets: np.ndarray, *, is_chat: bool
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Ids and mask of a text as the model is given them, and whether prompt and answer are encoded apart."""
        encoded = self._encoder.encoded(text, ids, offsets)
        ids, mask = encoded.ids, encoded.supervised
        if not is_chat:
            ids, mask = self._with_prefix(ids, mask)
        mask[:1] = False
        return ids, mask, encoded.apart

    def _rendered(self, row: Row, form: str) -> tuple[RenderedRow, bool]:
        """The texts of a row (none if it is empty), and whether a chat template wrote them."""
        if is_blank(row):
            return RenderedRow([]), False
        content = read_row(row, form, self._has_template)
        if content.is_empty:
            return RenderedRow([]), False
        if isinstance(content, Preference):
            raise RowError(
                "the row has a chosen and a rejected answer, and training.objective is sft",
                "Set training.objective: dpo (or another that learns from preferences), or give rows of answers.",
            )
        return self._written(content)

    def _written(self, content: Conversation | Plain) -> tuple[RenderedRow, bool]:
        """The texts of what a row says, and whether a chat template wrote them."""
        if isinstance(content, Plain):
            if self._end_token is None:
                raise RowError(
                    "the tokenizer has no eos_token to end an answer with", "Set one in the tokenizer's folder."
                )
            text = plain_text(content.prompt, content.completion, self._end_token, self.options.train_on)
            return RenderedRow([text]), False
        if not self._has_template:
            raise RowError("the row is a conversation, but the tokenizer has no chat template", self._offer)
        return render_turns(content, self._template, self.options.train_on), True

    def _with_prefix(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        prefix = self._encoder.prefix
        if not len(prefix) or np.array_equal(ids[: len(prefix)], prefix):
            return ids, mask
        return np.concatenate([prefix, ids]), np.concatenate([np.zeros(len(prefix), dtype=bool), mask])

    def _fit(self, chunk: _Chunk, row: int, ids: np.ndarray, mask: np.ndarray, *, is_text: bool) -> bool:
        """Add an example, cut if asked for; False if it is left out because of its length.

        Plain text is cut into pieces that overlap by one token, so that every token but the first carries loss once.
        """
        limit = self.options.max_length
        if len(ids) <= limit:
            chunk.add(row, ids, mask, Cut.WHOLE)
            return True
        if self.options.too_long == "split" and is_text:
            for begin in range(0, len(ids) - 1, limit - 1):
                piece = mask[begin : begin + limit].copy()
                piece[0] = False
                is_last = begin + limit >= len(ids)
                chunk.add(row, ids[begin : begin + limit], piece, Cut.WHOLE if is_last else Cut.PIECE)
            return True
        if self.options.too_long != "truncate" or not mask[:limit].any():
            return False
        chunk.add(row, ids[:limit], mask[:limit], Cut.TRUNCATED)
        return True


@dataclass(frozen=True, slots=True)
class _Faults:
    """Why rows cannot be used, by their number from `begin`."""

    rows: Joined
    begin: int
    faults: dict[int, InputError]

    @contextmanager
    def of(self, at: int) -> Generator[None]:
        """Notes what is raised inside as the fault of one row."""
        try:
            yield
        except InputError as error:
            self.faults[at] = error
        except RowError as error:
            self.faults[at] = InputError(error.what, where=self.rows.where(self.begin + at), fix=error.fix)
        except RecursionError:
            self.faults[at] = InputError("the row is nested too deeply", where=self.rows.where(self.begin + at))


def _each(rows: Joined, begin: int, end: int) -> Iterable[Row | InputError]:
    """Rows begin ... end, an error in the place of each that cannot be read."""
    try:
        return rows.read(begin, end)
    except InputError:
        return (_one(rows, index) for index in range(begin, end))


def _one(rows: Joined, index: int) -> Row | InputError:
    try:
        return rows[index]
    except InputError as error:
        return error


def _canonical(row: Row) -> str:
    try:
        return json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=as_json)
    except TypeError as error:
        raise RowError(f"the row has keys that are no texts: {error}") from None


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"the row holds half of a surrogate pair, {text[error.start]!r}, which is no character",
            "Write the whole pair (an emoji is two such escapes), or take it out.",
        ) from None


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _table(
    chunk: _Chunk,
    keys: np.ndarray,
    outcomes: np.ndarray,
    control: np.ndarray,
    lengths: np.ndarray,
    uneven: np.ndarray,
    masked: np.ndarray,
    unasked: np.ndarray,
) -> TokenTable:
    sizes = [len(ids) for ids in chunk.ids]
    return TokenTable(
        ids=_joined(chunk.ids, np.int32),
        supervised=_joined(chunk.supervised, np.bool_),
        starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        example_rows=np.array(chunk.example_rows, dtype=np.int64),
        cuts=np.array(chunk.cuts, dtype=np.uint8),
        digests=np.array(chunk.digests, dtype=np.uint64),
        row_keys=keys,
        outcomes=outcomes,
        control_text=control,
        row_lengths=lengths,
        uneven=uneven,
        masked_turns=masked,
        unasked=unasked,
    )


def _joined(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.array([], dtype=dtype)


def concatenated(tables: list[TokenTable]) -> TokenTable:
    """Tables of consecutive rows as one (row numbers in them already count from the first row of all)."""
    ends = np.cumsum([0, *(table.starts[-1] for table in tables)])
    starts = [table.starts[:-1] + offset for table, offset in zip(tables, ends[:-1], strict=True)]
    names = [field.name for field in fields(TokenTable) if field.name != "starts"]
    arrays = {name: np.concatenate([getattr(table, name) for table in tables]) for name in names}
    return TokenTable(**arrays, starts=np.append(np.concatenate(starts), ends[-1]).astype(np.int64))
