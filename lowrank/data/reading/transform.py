"""A function of the user's that each row goes through before anything else looks at it (`data.transform`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from lowrank.data.reading.formats import is_blank
from lowrank.data.reading.rows import Row, Rows, digest
from lowrank.errors import InputError
from lowrank.named_function import named_function, source_digest

KEY = "data.transform"


class _Transformed:
    """Rows as a function gives them back; one for which it gives None is empty."""

    def __init__(self, rows: Rows, named: str, function: Callable[[Row], Any]) -> None:
        self.name, self.before, self.named, self.function = rows.name, rows, named, function

    def __len__(self) -> int:
        return len(self.before)

    def __getitem__(self, index: int, /) -> Row:
        return self._given(self.before[index], index)

    def read(self, begin: int, end: int) -> list[Row]:
        """Rows begin ... end."""
        return [self._given(row, begin + at) for at, row in enumerate(self.before.read(begin, end))]

    def _given(self, row: Row, index: int) -> Row:
        if is_blank(row):
            return row
        try:
            given = self.function(copy.deepcopy(dict(row)))  # rows in memory are read more than once
        except Exception as error:  # whatever the user's function raises
            raise InputError(
                f"{self.named} raised {type(error).__name__}: {error}", where=self.where(index), fix=_FIX
            ) from error
        if given is not None and not isinstance(given, Mapping):
            raise InputError(f"{self.named} gave a {type(given).__name__}", where=self.where(index), fix=_FIX)
        return {} if given is None else given

    def where(self, index: int) -> str:
        """The row's own place."""
        return self.before.where(index)

    @property
    def fingerprint(self) -> str:
        """Of the rows, and of the module that the function is from."""
        return digest(f"{self.before.fingerprint} {source_digest(self.named, self.function, KEY)}".encode())


_FIX = "Let it give a row (a dict), or None to leave the row out."


def with_transform(rows: Rows, transform: str | None) -> Rows:
    """The rows, each through the function of that name.

    Raises:
        InputError: there is no such function, or it does not take a row.
    """
    return rows if transform is None else _Transformed(rows, transform, transform_of(transform))


def transform_of(named: str) -> Callable[[Row], Any]:
    """The function of that name. Raises InputError where there is none, or it does not take a row."""
    return named_function(named, KEY, ("row",))
