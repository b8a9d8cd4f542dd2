"""Where rows come from: the sources that a config or a Python user names, put one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, cast

import numpy as np

from lowrank.data.reading.columns import checked_columns, with_columns
from lowrank.data.reading.formats import FORMATS, detect, is_blank
from lowrank.data.reading.readers import open_rows
from lowrank.data.reading.row_error import RowError
from lowrank.data.reading.rows import Row, RowList, Rows, digest
from lowrank.data.reading.tables import dataset_rows
from lowrank.data.reading.transform import with_transform
from lowrank.errors import InputError

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, slots=True)
class Source:
    """One source of rows.

    Attributes:
        path: A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, also compressed), a pattern such as
            `data/*.jsonl`, a folder of such files or one that `Dataset.save_to_disk` wrote, or the name of a data set
            on a hub.
        format: A key of `FORMATS`, or None to find it by looking at the first row.
        weight: This source's share of an epoch's examples relative to the other sources' weights; None: as it is.
        split: Which split of a data set that has several.
        subset: Which configuration of a data set on a hub.
        columns: Where the keys of a format are found in these rows, such as {"prompt": "question"}.
    """

    path: str
    format: str | None = None
    weight: float | None = None
    split: str = "train"
    subset: str | None = None
    columns: Mapping[str, str] | None = None


# A format is looked for in so many rows where the first ones cannot be read.
LOOKED_AT = 100

Sources = Union[
    str, Path, Source, Mapping[str, Any], Sequence[str | Path | Source | Mapping[str, Any]], "datasets.Dataset"
]


class Part:
    """An opened source: its rows, their format and its weight."""

    def __init__(self, rows: Rows, asked_format: str | None, weight: float | None) -> None:
        self.rows, self.asked_format, self.weight = rows, asked_format, weight

    @cached_property
    def format(self) -> str:
        """The format asked for, or that of the first row that is not empty.

        Raises:
            InputError: there is no row, or it fits no format.
        """
        found = self.asked_format or format_of(self.rows)
        if found is None:
            raise InputError("there are no rows, or all are empty", where=self.rows.name)
        return found


def format_of(rows: Rows) -> str | None:
    """The format of the first row that is not empty and fits one; None if all are empty.

    Raises:
        InputError: none of the first rows does.
    """
    first: InputError | None = None
    for index in range(len(rows)):
        try:
            row = rows[index]
            if not is_blank(row):
                return detect(row)
        except RowError as error:
            first = first or InputError(error.what, where=rows.where(index), fix=error.fix)
        except InputError as error:
            first = first or error
        if first and index >= LOOKED_AT:
            break
    if first:
        raise first
    return None


def open_sources(
    sources: Sources,
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
    transform: str | None = None,
) -> list[Part]:
    """Open every source that is named, without reading rows yet.

    Args:
        sources: A path, a `Source` (or a mapping of its fields), a list of those, a list of rows, or a
            `datasets.Dataset`.
        form: The format of all rows, where a source does not name its own; None: found by looking.
        columns: Where the keys of a format are found, where a source does not say so itself.
        transform: The function (`module:function`) that each row goes through before that.

    Raises:
        InputError: a source is missing or of an unknown kind, a format is unknown, or weights are not right.
    """
    if type(sources).__module__.startswith("datasets."):  # told without importing `datasets`
        if type(sources).__name__ != "Dataset":
            fix = "Give one Dataset: of a DatasetDict a split; of an IterableDataset its source."
            raise InputError(f"a {type(sources).__name__} cannot be read from", where="data.train", fix=fix)
        rows = as_asked(dataset_rows(cast("datasets.Dataset", sources), "data set"), columns, transform)
        return [Part(rows, checked_format(form), None)]
    if isinstance(sources, Sequence) and not isinstance(sources, str) and _are_rows(sources):
        rows = as_asked(RowList(cast("Sequence[Row]", sources), "rows"), columns, transform)
        return [Part(rows, checked_format(form), None)]
    return [
        Part(
            as_asked(open_rows(item.path, item.split, item.subset), item.columns or columns, transform),
            checked_format(item.format or form),
            item.weight,
        )
        for item in named_sources(sources)
    ]


def as_asked(rows: Rows, columns: Mapping[str, str] | None, transform: str | None) -> Rows:
    """The rows, each through the user's function, then under the names that formats have for their columns."""
    return with_columns(with_transform(rows, transform), checked_columns(columns))


def named_sources(sources: Sources) -> list[Source]:
    """The sources that are named, one by one.

    Raises:
        InputError: there is none, a field is unknown, or weights are not right.
    """
    single = isinstance(sources, str | Path | Source | Mapping)
    named = [_source(item) for item in ([sources] if single else sources)]
    if not named:
        raise InputError("no source of rows is named", where="data.train")
    _check_weights(named)
    return named


def _are_rows(sources: Sequence[Any]) -> bool:
    return bool(sources) and isinstance(sources[0], Mapping) and "path" not in sources[0]


def _source(item: Any) -> Source:
    if isinstance(item, Source):
        return item
    if not isinstance(item, Mapping):
        return Source(str(item))
    known = [field.name for field in fields(Source)]
    unknown = [key for key in item if key not in known]
    if unknown:
        raise InputError(f"a source has no {unknown[0]!r}", where="data.train", fix=f"Known: {', '.join(known)}.")
    return Source(**item)


def checked_format(form: str | None) -> str | None:
    """The format asked for. Raises InputError where there is no such format."""
    if form is not None and form not in FORMATS:
        raise InputError(f"there is no format {form!r}", where="data.format", fix=f"Formats: {', '.join(FORMATS)}.")
    return form


def _check_weights(sources: Sequence[Source]) -> None:
    weights = [source.weight for source in sources]
    if any(weight is not None for weight in weights) and None in weights:
        raise InputError("some sources have a weight, others none", where="data.train", fix="Weigh all or none.")
    if any(weight is not None and weight <= 0 for weight in weights):
        raise InputError(f"weights must be above 0, not {weights}", where="data.train")


class Joined:
    """The rows of several sources, one source after another.

    A `limit` on the rows in all is shared out evenly; a source with fewer rows gives what it has.
    """

    def __init__(self, parts: Sequence[Part], limit: int | None = None) -> None:
        self.parts, self._limit = list(parts), limit
        self.name = ", ".join(part.rows.name for part in parts)

    @cached_property
    def _ends(self) -> np.ndarray:
        counts = [len(part.rows) for part in self.parts]
        if self._limit is not None:
            each, rest = divmod(self._limit, len(counts))
            counts = [min(count, each + (at < rest)) for at, count in enumerate(counts)]
        return np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def parts_of(self, rows: np.ndarray) -> np.ndarray:
        """Which of `parts` each of the rows lies in, (n,) int64."""
        return np.searchsorted(self._ends, rows, side="right")

    def _located(self, index: int) -> tuple[Part, int]:
        part = int(self.parts_of(np.array([index]))[0])
        return self.parts[part], index - (int(self._ends[part - 1]) if part else 0)

    def __getitem__(self, index: int, /) -> Row:
        part, at = self._located(index)
        return part.rows[at]

    def read(self, begin: int, end: int) -> list[Row]:
        """Rows begin ... end."""
        rows: list[Row] = []
        while begin < end:
            part, at = self._located(begin)
            count = min(end, int(self._ends[self.parts_of(np.array([begin]))[0]])) - begin
            rows += part.rows.read(at, at + count)
            begin += count
        return rows

    def where(self, index: int) -> str:
        """File and line."""
        part, at = self._located(index)
        return part.rows.where(at)

    def formats(self, begin: int, end: int) -> list[str]:
        """The formats of rows begin ... end."""
        return [self.parts[part].format for part in self.parts_of(np.arange(begin, end))]

    @property
    def fingerprint(self) -> str:
        """Changes when a source's content, the format asked for, or the limit does."""
        told = [f"{part.rows.fingerprint} {part.asked_format}" for part in self.parts]
        return digest("\n".join([*told, str(self._limit)]).encode())
