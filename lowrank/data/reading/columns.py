"""Columns under other names than the formats' own: which is which is said once, and every row is read so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress

from lowrank.data.reading.formats import FORMATS, SYSTEM, is_blank
from lowrank.data.reading.rows import Row, Rows, digest
from lowrank.data.reading.task_formats import TASK_FORMATS
from lowrank.errors import InputError

ANYWHERE = (SYSTEM[0], "tools")
LOOKED_AT = 100


def checked_columns(columns: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """The columns as given. Raises InputError where a format has no such key, or no format has all of them."""
    known = sorted({key for form in (*FORMATS.values(), *TASK_FORMATS.values()) for key in form.keys})
    for key in columns or ():
        if key not in known and key not in ANYWHERE:
            fix = f"Known are {', '.join((*known, *ANYWHERE))}."
            raise InputError(f"no format has a column {key!r}", where="data.columns", fix=fix)
    if columns and not _fitting(columns):
        told = ", ".join(key for key in columns if key not in ANYWHERE)
        raise InputError(f"no format has all of {told}", where="data.columns")
    return columns or None


def _fitting(columns: Mapping[str, str]) -> list[str]:
    """The formats that have all of the columns that are named."""
    asked = {key for key in columns if key not in ANYWHERE}
    return [name for name, form in {**FORMATS, **TASK_FORMATS}.items() if asked <= set(form.keys)]


class _Renamed:
    """Rows whose columns have the names that formats give them."""

    def __init__(self, rows: Rows, columns: Mapping[str, str]) -> None:
        """Rename.

        Args:
            rows: The rows as they are.
            columns: Where each key of a format is found: {"prompt": "question", "completion": "answer"}.
        """
        self.name, self.before, self.columns = rows.name, rows, columns
        fitting = _fitting(columns)
        own = {key for name in fitting for key in {**FORMATS, **TASK_FORMATS}[name].keys}
        formats = {key for form in FORMATS.values() for key in (*form.keys, *form.other_names)}
        formats |= {key for form in TASK_FORMATS.values() for key in form.keys}
        # What another format would read is not meant: the columns that are named say which format it is.
        self._hidden = formats - own

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, index: int, /) -> Row:
        return self._renamed(self.before[index])

    def read(self, begin: int, end: int) -> list[Row]:
        """Rows begin ... end."""
        return [self._renamed(row) for row in self.before.read(begin, end)]

    def _renamed(self, row: Row) -> Row:
        if is_blank(row):
            return row
        taken = {*self.columns.values(), *self.columns}
        others = {key: value for key, value in row.items() if key not in taken and key not in self._hidden}
        return {**{key: row[column] for key, column in self.columns.items() if column in row}, **others}

    def where(self, index: int) -> str:
        """The row's own place."""
        return self.before.where(index)

    @property
    def fingerprint(self) -> str:
        """Of the rows and the names."""
        return digest(f"{self.before.fingerprint} {json.dumps(dict(self.columns), sort_keys=True)}".encode())


def with_columns(rows: Rows, columns: Mapping[str, str] | None) -> Rows:
    """The rows, renamed if columns are named."""
    return rows if not columns else _Renamed(rows, columns)


def check_columns(rows: Rows) -> None:
    """Raises InputError where a column that is named is in none of the first rows."""
    if not isinstance(rows, _Renamed):
        return
    seen: set[str] = set()
    for index in range(min(len(rows), LOOKED_AT)):
        with suppress(InputError):
            seen |= set(rows.before[index])
    for key, column in rows.columns.items():
        if seen and column not in seen:
            raise InputError(
                f"there is no column {column!r}, which data.columns gives for {key!r}",
                where=rows.name,
                fix=f"Columns: {', '.join(sorted(seen))}.",
            )
