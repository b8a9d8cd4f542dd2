"""From sources to examples: read, render, tokenise, align, count, and remember the outcome."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lowrank.data.examples.example import Examples
from lowrank.data.examples.token_table import Outcome, TokenTable
from lowrank.data.loading.bad_rows import left_out, watched
from lowrank.data.loading.reading_progress import progress
from lowrank.data.loading.store import TableWriter, cache_key, cache_root, forget_unused, open_table
from lowrank.data.loading.workers import tables
from lowrank.data.reading.columns import check_columns
from lowrank.data.reading.sources import Joined, Sources, open_sources
from lowrank.data.supervision.row_options import Options
from lowrank.data.supervision.tokenise import Tokeniser, concatenated
from lowrank.errors import InputError

# Fewer rows are tokenised again at every start, which takes less than a second.
WORTH_CACHING = 2000


def load_examples(
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
    max_rows: int | None = None,
    workers: int | None = None,
    today: str | None = None,
) -> Examples:
    """Read a data set and turn it into examples.

    Args:
        source: A path, a `Source` (or a mapping of its fields), a list of those, or a list of rows.
        tokenizer: A fast tokenizer; conversations need its chat template.
        train_on: `assistant`, `last_assistant`, `completion` or `all`.
        max_length: The most tokens in an example.
        too_long: What to do with a longer one: `error`, `drop`, `truncate`, or for plain text `split`.
        format: A key of `FORMATS`, or None to find it by looking at the rows.
        columns: Where the keys of a format are found in the rows, such as {"prompt": "question"}.
        transform: A function (`module:function`) that takes a row (a dict) before its format is looked at, and gives
            one, or None to leave it out.
        bad_rows: What to do with rows that cannot be used: `error`, or `skip` them, if they are few.
        max_rows: Read only so many rows, the same number from each source.
        workers: Processes that tokenise; None: one for each core where that is worth it.
        today: The date (2026-11-26) for chat templates that write the day's; None: the day it is.

    Raises:
        InputError: names the file and line of what cannot be used.
    """
    rows = Joined(open_sources(source, format, columns, transform), max_rows)
    examples = tokenised(rows, tokenizer, Options(train_on, max_length, too_long, bad_rows, today), workers)
    return _mixed(examples, rows)


def load_train_eval(
    train: Sources,
    eval: Sources | float | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on: str = "assistant",
    max_length: int,
    too_long: str = "error",
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    transform: str | None = None,
    bad_rows: str = "error",
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
    workers: int | None = None,
    today: str | None = None,
) -> tuple[Examples, Examples | None]:
    """Read the examples to train on and those to evaluate on.

    Args:
        train: As `source` of `load_examples`.
        eval: The same, or the share of the training rows (above 0, below 1) to set aside, or None. Which rows are set
            aside depends on their content: adding rows moves none from one side to the other (but where chance would
            give a side of few rows less than half of its share), and equal rows are on the same side.
        tokenizer: As in `load_examples`, like `train_on` and all that is named there too.
        train_on: See there.
        max_length: See there.
        too_long: See there.
        format: See there.
        columns: See there.
        transform: See there.
        bad_rows: See there.
        max_train_rows: Read only so many rows of `train`.
        max_eval_rows: Evaluate on only so many rows.
        workers: See there.
        today: See there.

    Raises:
        InputError: names the file and line of what cannot be used, or a share that leaves one side empty.
    """
    options = Options(train_on, max_length, too_long, bad_rows, today)
    rows = Joined(open_sources(train, format, columns, transform), max_train_rows)
    examples = tokenised(rows, tokenizer, options, workers)
    if eval is None:
        return _mixed(examples, rows), None
    if isinstance(eval, float | int):
        trained, held_out = split_by_hash(examples, eval)
        return _mixed(trained, rows), held_out if max_eval_rows is None else first_rows(held_out, max_eval_rows)
    eval_rows = Joined(open_sources(eval, format, columns, transform), max_eval_rows)
    return _mixed(examples, rows), _mixed(tokenised(eval_rows, tokenizer, options, workers), eval_rows)


def tokenised(rows: Joined, tokenizer: PreTrainedTokenizerBase, options: Options, workers: int | None) -> Examples:
    """All rows as examples, from the cache if they have been tokenised before."""
    for part in rows.parts:
        check_columns(part.rows)
    folder = cache_root() / cache_key(rows.fingerprint, tokenizer, options)
    table = open_table(folder)
    if table is None:
        table = _new_table(rows, Tokeniser(tokenizer, options), folder, workers)
    bad = np.flatnonzero(table.outcomes == Outcome.BAD)
    why = left_out(bad, rows, Tokeniser(tokenizer, options)) if len(bad) else []
    examples = Examples(table, rows, train_on=options.train_on, reasons=why)
    if options.too_long in ("error", "split"):
        _refuse_too_long(examples, rows, options.max_length)
    if not len(examples):
        report = examples.report
        what = f"no examples are left: {report.empty} of {report.rows} rows are empty, {report.dropped} too long"
        what += f", {report.marked} say of every turn that it carries no loss" if report.marked else ""
        raise InputError(what, where=rows.name)
    return examples


def _new_table(rows: Joined, tokeniser: Tokeniser, folder: Path, workers: int | None) -> TokenTable:
    if not len(rows):
        raise InputError("there are no rows", where=rows.name)
    if len(rows) >= WORTH_CACHING and (table := _written(rows, tokeniser, folder, workers)) is not None:
        return table
    return concatenated(list(_parts(rows, tokeniser, workers)))


def _parts(rows: Joined, tokeniser: Tokeniser, workers: int | None) -> Iterator[TokenTable]:
    """The tokens of all rows; bad rows are refused, unless they are to be skipped."""
    with progress("tokenising rows", len(rows)) as advance:
        parts = _counted(tables(rows, tokeniser, workers), advance)
        yield from watched(parts, rows, tokeniser) if tokeniser.options.bad_rows == "error" else parts


def _written(rows: Joined, tokeniser: Tokeniser, folder: Path, workers: int | None) -> TokenTable | None:
    """The table, written into the cache and read from there; None, with a warning, where it cannot be written."""
    try:
        with TableWriter(folder) as writer:
            for part in _parts(rows, tokeniser, workers):
                writer.append(part)
        forget_unused(folder.parent)
    except OSError as error:
        warnings.warn(
            f"the tokens are not kept for the next start: {folder.parent}: {error.strerror or error}. "
            "Make room there, or name another folder in the environment variable LOWRANK_CACHE.",
            stacklevel=2,
        )
        return None
    return open_table(folder)


def _counted(parts: Iterator[TokenTable], advance: Callable[[int], None]) -> Iterator[TokenTable]:
    for part in parts:
        advance(len(part.outcomes))
        yield part


def _refuse_too_long(examples: Examples, rows: Joined, max_length: int) -> None:
    over = (examples.table.outcomes == Outcome.TOO_LONG).nonzero()[0]
    if len(over):
        lengths = examples.table.row_lengths[over]
        raise InputError(
            f"{len(over)} of {len(rows)} rows are longer than data.max_length = {max_length} tokens; the first has "
            f"{lengths[0]}, the longest ({rows.where(int(over[lengths.argmax()]))}) {lengths.max()}",
            where=rows.where(int(over[0])),
            fix="Raise data.max_length, or set data.too_long to drop or truncate (plain text: also split).",
        )


def split_by_hash(examples: Examples, share: float) -> tuple[Examples, Examples]:
    """Set a share of the rows aside, chosen by their content: the others, and those.

    Rows go by a hash of their content, from the lowest up, so that adding rows moves few or none of those there; rows
    that are equal go together. Of few rows chance could set none aside: each side gets half of its share at least.

    Raises:
        InputError: all rows are one, so that one side would be empty.
    """
    if not 0 < share < 1:
        raise InputError(f"a share of {share} cannot be set aside", where="data.eval", fix="Give one between 0 and 1.")
    used = np.unique(examples.table.row_keys[examples.table.example_rows[examples.order]])
    least, most = max(1, int(len(used) * share / 2)), len(used) - max(1, int(len(used) * (1 - share) / 2))
    count = max(least, min(most, int((used < np.uint64(int(share * 2**64))).sum())))
    aside = examples.table.row_keys <= used[count - 1]
    owners = aside[examples.table.example_rows[examples.order]]
    sides = [
        examples.select(examples.order[chosen], row_mask) for chosen, row_mask in ((~owners, ~aside), (owners, aside))
    ]
    if not all(map(len, sides)):
        raise InputError(
            f"of {len(aside)} rows, all usable ones the same, none can be set aside",
            where="data.eval",
            fix="Give more rows, or a file of its own.",
        )
    return sides[0], sides[1]


def first_rows(examples: Examples, count: int) -> Examples:
    """The examples of the first `count` rows of a set."""
    chosen = np.flatnonzero(examples.row_mask)[:count]
    mask = np.zeros_like(examples.row_mask)
    mask[chosen] = True
    return examples.select(examples.order[mask[examples.table.example_rows[examples.order]]], mask)


def _mixed(examples: Examples, rows: Joined) -> Examples:
    """The examples in the shares that the weights of their sources ask for; without weights, as they are.

    An epoch keeps its number of examples. A source whose share is larger than what it has is repeated; of one whose
    share is smaller, the rows with the lowest hash are taken, so adding rows changes the choice little.

    Raises:
        InputError: a source with a weight has no examples.
    """
    weights = [part.weight for part in rows.parts]
    if len(weights) == 1 or None in weights:
        return examples
    owners = rows.parts_of(examples.table.example_rows[examples.order])
    total = sum(weight for weight in weights if weight is not None)
    orders = []
    for at, weight in enumerate(weights):
        own = examples.order[owners == at]
        if not len(own):
            raise InputError("no examples are left of a source that has a weight", where=rows.parts[at].rows.name)
        assert weight is not None
        repeats, rest = divmod(round(len(examples) * weight / total), len(own))
        by_hash = np.argsort(examples.table.row_keys[examples.table.example_rows[own]], kind="stable")
        orders += [*[own] * repeats, own[np.sort(by_hash[:rest])]]
    return examples.select(np.concatenate(orders))
