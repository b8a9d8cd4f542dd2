"""Batches of a data set that does not fit: rows are read one after another, tokenised and packed from a buffer."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from lowrank.data.batches.batch import Batch, packed_batch, padded_batch
from lowrank.data.batches.batch_plan import BatchPlan
from lowrank.data.batches.beginnings import beginnings_of
from lowrank.data.batches.bin_packing import WINDOW, best_fit_decreasing
from lowrank.data.batches.grouping import Members, Room, pack_forests
from lowrank.data.batches.prefetch import Prefetched
from lowrank.data.examples.example import Examples, IdsAndMask
from lowrank.data.examples.figures import StreamCounts
from lowrank.data.examples.token_table import Outcome
from lowrank.data.loading.bad_rows import LISTED, reason, refusal, refuse_many
from lowrank.data.loading.load import tokenised
from lowrank.data.reading.columns import checked_columns
from lowrank.data.reading.readers import Placed, stream_fingerprint, stream_rows
from lowrank.data.reading.rows import RowList, Rows, digest
from lowrank.data.reading.sources import (
    Joined,
    Part,
    Source,
    Sources,
    as_asked,
    checked_format,
    format_of,
    named_sources,
)
from lowrank.data.reading.transform import KEY as TRANSFORM
from lowrank.data.reading.transform import transform_of
from lowrank.data.supervision.check_supervision import check_fits, check_supervision
from lowrank.data.supervision.row_options import Options
from lowrank.data.supervision.tokenise import Tokeniser
from lowrank.errors import InputError
from lowrank.named_function import source_digest

# A pack that is less full goes back into the buffer for a later one.
FULL_ENOUGH = 0.98
CHUNK_ROWS = 500
# The format that stands for rows which are all empty, of which none is read.
EMPTY_ROWS_FORMAT = "text"


@dataclass(frozen=True, slots=True)
class BatchStream:
    """Batches from a stream of rows; made by `stream_batches`. How many an epoch has is known only at its end.

    With a `room`, packs hold what examples begin with in common once, as far as those in the buffer do (`grouping`).
    Every row's supervision is proved as it is read; `counts` says what has been read and what became of it.
    """

    sources: list[Source]
    format: str | None
    tokenizer: PreTrainedTokenizerBase
    tokeniser: Tokeniser
    packing: bool
    batch_size: int
    max_tokens: int
    pad_token_id: int
    seed: int
    buffer: int
    columns: Mapping[str, str] | None = None
    transform: str | None = None
    room: Room | None = None
    unshared: str | None = None
    limits: tuple[int, int | None] | None = None
    counts: StreamCounts = field(default_factory=StreamCounts, compare=False)

    def sample(self, rows: int) -> Examples:
        """The examples of the first rows, `rows` in all and as many from each source; no more than those are read.

        Raises:
            InputError: as `load_examples`.
        """
        each = -(-rows // len(self.sources))
        parts = []
        for source in self.sources:
            first = list(islice(stream_rows(source.path, source.split, source.subset), each))
            parts.append(Part(self._row_list(first, source), source.format or self.format, None))
        return tokenised(Joined(parts), self.tokenizer, self.tokeniser.options, workers=1)

    def largest(self) -> Batch:
        """The largest batch that can come, of tokens without meaning."""
        longest = self.tokeniser.options.max_length
        longest = min(longest, self.limits[1] or longest) if self.limits else longest
        lengths = [longest] * (self.max_tokens // longest if self.packing else self.batch_size)
        if self.packing and self.max_tokens % longest > 1:
            lengths.append(self.max_tokens % longest)
        parts = [(np.zeros(length, dtype=np.int32), np.arange(length) > 0) for length in lengths]
        return packed_batch(parts) if self.packing else padded_batch(parts, self.pad_token_id)

    def for_model(self, vocabulary: int, positions: int | None) -> Self:
        """The stream with every row proved to fit a model as it is read (as `check_fits` does)."""
        return replace(self, limits=(vocabulary, positions))

    def demanding(self, count: int) -> list[Batch]:
        """The largest alone."""
        return [self.largest()]

    def passing(self) -> None:
        """Not known before rows are packed."""

    def fill(self) -> None:
        """Not known before rows are packed."""

    @property
    def examples(self) -> None:
        """Never all here."""

    @property
    def origin(self) -> str:
        """Where the rows come from."""
        return f"streamed from {', '.join(source.path for source in self.sources)}"

    @property
    def reasons(self) -> list[str]:
        """Why the first rows that were left out as bad cannot be used."""
        return self.counts.reasons

    @property
    def fingerprint(self) -> str:
        """Of where the rows come from, of what the files there hold as far as a glance tells, and of the room of packs
        that share beginnings."""
        told = [f"{stream_fingerprint(each.path, each.split, each.subset)} {each.weight}" for each in self.sources]
        told += [] if self.room is None else [str(self.room)]
        if self.transform is not None:
            told.append(source_digest(self.transform, transform_of(self.transform), TRANSFORM))
        return digest("\n".join(told).encode())

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; what comes before is read and packed again, not built."""
        for parts, shared in islice(self._groups(epoch), start, None):
            yield packed_batch(parts, shared) if self.packing else padded_batch(parts, self.pad_token_id)

    def sizes(self, epoch: int) -> None:
        """Not known: how many batches an epoch has shows at its end."""

    def upcoming(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """As `batches`, read ahead by a thread; close it to stop that before the end."""
        with Prefetched(self.batches(epoch, start)) as ahead:
            yield from ahead

    @property
    def shares(self) -> bool:
        """Whether what examples begin with in common is computed once."""
        return self.room is not None

    def as_sampled(self, plan: BatchPlan) -> BatchStream:
        """The stream with packs as those of a plan for its first rows: shared beginnings once or not, and as large."""
        room = None if plan.sharing is None else plan.sharing.room
        return replace(self, room=room, unshared=plan.unshared)

    def without_sharing(self, why: str | None = None) -> Self:
        """The same rows, each of them computed from its beginning."""
        return replace(self, room=None, unshared=why)

    def _groups(self, epoch: int) -> Iterator[tuple[list[IdsAndMask], list[int] | None]]:
        rng = np.random.default_rng([self.seed, epoch])
        waiting: list[IdsAndMask] = []
        # A buffer's worth is read ahead: the next is ready when the packs of this one are used up.
        ahead = -(-self.buffer // CHUNK_ROWS)
        with Prefetched(self._chunks(np.random.default_rng([self.seed, epoch, 1])), ahead) as chunks:
            for example in chain.from_iterable(chunks):
                waiting.append(example)
                if len(waiting) >= self.buffer:
                    full, waiting = self._grouped(waiting, rng, last=False)
                    yield from full
        full, _ = self._grouped(waiting, rng, last=True)
        yield from full

    def _grouped(
        self, waiting: Sequence[IdsAndMask], rng: np.random.Generator, *, last: bool
    ) -> tuple[list[tuple[list[IdsAndMask], list[int] | None]], list[IdsAndMask]]:
        """The buffer as groups in a shuffled order, each with what its examples share with the ones before them; and
        what waits on for a fuller pack (at most half of it)."""
        shuffled = [waiting[at] for at in rng.permutation(len(waiting))]
        bins, fills = self._binned(shuffled)
        kept = len(bins) if last else max(sum(fill >= FULL_ENOUGH for fill in fills), (len(bins) + 1) // 2)
        groups = [
            ([shuffled[row] for row in members.rows], None if members.shared is None else members.shared.tolist())
            for members in bins
        ]
        return [groups[at] for at in rng.permutation(kept)], [part for parts, _ in groups[kept:] for part in parts]

    def _binned(self, examples: Sequence[IdsAndMask]) -> tuple[list[Members], list[float]]:
        """Packs, the fullest first, or rows of like length; and how full each is."""
        lengths = np.array([len(ids) for ids, _ in examples], dtype=np.int64)
        if not self.packing:
            order = np.argsort(lengths, kind="stable")
            rows = [np.sort(order[at : at + self.batch_size]) for at in range(0, len(order), self.batch_size)]
            return [Members(each) for each in rows], [float(len(each) == self.batch_size) for each in rows]
        room = self.room or Room(self.max_tokens)
        if self.room is not None:
            alike = beginnings_of([ids for ids, _ in examples])
            bins = pack_forests(np.arange(len(examples)), lengths, alike, room, window=max(len(examples), 1))
        else:
            bins = [Members(np.sort(items)) for items in best_fit_decreasing(lengths, self.max_tokens)]
        real = [int(lengths[members.rows].sum()) for members in bins]
        saved = [0 if members.shared is None else int(members.shared.sum()) for members in bins]
        fills = [room.size(all_ - shared, all_) / room.computed for all_, shared in zip(real, saved, strict=True)]
        fullest = sorted(range(len(bins)), key=lambda at: -fills[at])
        return [bins[at] for at in fullest], [fills[at] for at in fullest]

    def _chunks(self, rng: np.random.Generator) -> Iterator[list[IdsAndMask]]:
        formats = [source.format or self.format for source in self.sources]
        rows = self._interleaved(rng)
        while chunk := list(islice(rows, min(CHUNK_ROWS, self.buffer))):
            for at, source in enumerate(self.sources):
                own = self._row_list([placed for owner, placed in chunk if owner == at], source)
                if len(own):
                    form = formats[at] = formats[at] or format_of(own)
                    yield self._tokenised(own, form or EMPTY_ROWS_FORMAT)

    def _interleaved(self, rng: np.random.Generator) -> Iterator[tuple[int, Placed]]:
        """Rows with the number of their source: drawn by weight until one source ends, or one source after another."""
        streams = [stream_rows(source.path, source.split, source.subset) for source in self.sources]
        weights = [source.weight for source in self.sources if source.weight is not None]
        if not weights:
            yield from ((at, placed) for at, stream in enumerate(streams) for placed in stream)
            return
        shares = np.array(weights) / sum(weights)
        while True:
            at = rng.choice(len(streams), p=shares)
            placed = next(streams[at], None)
            if placed is None:
                return
            yield at, placed

    def _tokenised(self, rows: Rows, form: str) -> list[IdsAndMask]:
        options, joined = self.tokeniser.options, Joined([Part(rows, form, None)])
        table = self.tokeniser.table(joined, 0, len(rows))
        self._judge(joined, np.flatnonzero(table.outcomes == Outcome.BAD))
        over = np.flatnonzero(table.outcomes == Outcome.TOO_LONG)
        if len(over) and options.too_long in ("error", "split"):
            raise InputError(
                f"the row has {table.row_lengths[over[0]]} tokens, more than data.max_length = {options.max_length}",
                where=rows.where(int(over[0])),
                fix="Raise data.max_length, or set data.too_long to drop or truncate.",
            )
        examples = Examples(table, rows, train_on=options.train_on)
        check_supervision(examples, self.tokenizer)
        if self.limits:
            check_fits(examples, self.tokenizer, *self.limits)
        self.counts.add(table)
        if self.counts.rows >= CHUNK_ROWS:
            refuse_many(self.counts.bad, self.counts.rows, rows.name, self.counts.reasons)
        borders = zip(table.starts[:-1], table.starts[1:], strict=True)
        return [(table.ids[begin:end], table.supervised[begin:end]) for begin, end in borders]

    def _judge(self, rows: Joined, bad: np.ndarray) -> None:
        """Refuse bad rows, or note the first of them."""
        if len(bad) and self.tokeniser.options.bad_rows == "error":
            raise refusal(bad.tolist(), len(rows), rows, self.tokeniser)
        known = self.counts.reasons  # those of an earlier epoch among them
        for at in bad.tolist() if len(known) < LISTED else ():
            told = reason(rows, at, self.tokeniser)
            known.extend([told] if told not in known and len(known) < LISTED else [])

    def _row_list(self, placed: Sequence[Placed], source: Source) -> Rows:
        rows = RowList([row for row, _ in placed], source.path, [where for _, where in placed])
        return as_asked(rows, source.columns or self.columns, self.transform)


def stream_batches(
    source: Sources,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on: str = "assistant",
    max_length: int,
    too_long: str = "error",
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    transform: str | None = None,
    bad_rows: str = "error",
    packing: bool,
    batch_size: int,
    max_tokens: int,
    pad_token_id: int,
    seed: int,
    buffer: int = WINDOW,
    today: str | None = None,
) -> BatchStream:
    """Batches of rows that are never all in memory, nor on this machine's disk if they come from a hub.

    Args:
        source: As in `load_examples`, but not rows in memory. With weights, rows are drawn from the sources in these
            proportions until one source ends; without, the sources follow one another.
        tokenizer: As in `load_examples`, like `train_on` and all up to `bad_rows`.
        train_on: See there.
        max_length: See there.
        too_long: See there; `error` is raised when the row is reached.
        format, columns, transform: See there.
        bad_rows: See there; `error` is raised when the row is reached, and with `skip` when too many have been.
        packing: As in `plan_batches`, like `batch_size`, `max_tokens`, `pad_token_id` and `seed`.
        batch_size, max_tokens, pad_token_id, seed: See there.
        buffer: Examples that are shuffled and packed together.
        today: As in `load_examples`.

    Raises:
        InputError: a source is not there, or packs are smaller than examples may be.
    """
    if packing and max_tokens < max_length:
        raise InputError(
            f"examples of up to {max_length} tokens do not fit into packs of {max_tokens}",
            where="training.tokens_per_batch",
            fix="Raise it to data.max_length at least.",
        )
    sources = named_sources(source)
    for form in (format, *(each.format for each in sources)):
        checked_format(form)
    checked_columns(columns)
    if transform is not None:
        transform_of(transform)
    tokeniser = Tokeniser(tokenizer, Options(train_on, max_length, too_long, bad_rows, today))
    shape = packing, batch_size, max_tokens, pad_token_id, seed, buffer
    return BatchStream(sources, format, tokenizer, tokeniser, *shape, columns, transform)
