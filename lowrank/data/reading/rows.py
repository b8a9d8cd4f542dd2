"""Rows of one source, read when they are asked for, each with the place to name when it is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from lowrank.data.reading.data_files import Content, decoded, parsed_json
from lowrank.data.reading.row_error import RowError
from lowrank.errors import InputError

Row = Mapping[str, Any]


def as_json(value: Any) -> Any:
    """What stands in JSON for a value it does not know: a hash of bytes, an array's numbers, the text of others."""
    if isinstance(value, bytes):
        return digest(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)


class Rows(Protocol):
    """Rows of one source. Nothing is read before it is asked for."""

    name: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...

    def read(self, begin: int, end: int) -> list[Row]:
        """Rows begin ... end."""
        ...

    def where(self, index: int) -> str:
        """File and line, or source and row number (from 1), of a row."""
        ...

    @property
    def fingerprint(self) -> str:
        """A text that changes when the content does."""
        ...


# Line breaks are looked for in so many bytes at a time: a mask of a whole file would be as large as the file.
BLOCK_BYTES = 64 * 2**20


def digest(content: Content | memoryview) -> str:
    """A hash of bytes, as 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def parsed_line(line: bytes, name: str, number: int) -> Row:
    """The row in one line of a JSONL file; a blank line is a row without keys.

    Raises:
        InputError: the line is not a JSON object.
    """
    where, text = f"{name}:{number}", decoded(line, name, number)
    if not text.strip():
        return {}
    try:
        row = parsed_json(text, "the line is")
    except RowError as error:
        raise InputError(error.what, where=where, fix=error.fix) from None
    if not isinstance(row, dict):
        raise InputError(f"the line is not a JSON object: {text.strip()[:60]!r}", where=where)
    return row


class JsonLines:
    """The bytes of a JSONL file; a line is parsed when its row is asked for. Row i is line i + 1."""

    def __init__(self, content: Content, name: str) -> None:
        self.name, self._bytes = name, content

    @cached_property
    def _starts(self) -> np.ndarray:
        content = np.frombuffer(self._bytes, dtype=np.uint8)
        blocks = range(0, len(content), BLOCK_BYTES)
        breaks = [begin + np.flatnonzero(content[begin : begin + BLOCK_BYTES] == ord("\n")) for begin in blocks]
        starts = np.concatenate([[0], *(found + 1 for found in breaks)]).astype(np.int64)
        return starts if starts[-1] == len(self._bytes) else np.append(starts, len(self._bytes))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int, /) -> Row:
        return parsed_line(self._bytes[self._starts[index] : self._starts[index + 1]], self.name, index + 1)

    def read(self, begin: int, end: int) -> list[Row]:
        """Rows begin ... end."""
        return [self[index] for index in range(begin, end)]

    def where(self, index: int) -> str:
        """File and line."""
        return f"{self.name}:{index + 1}"

    @property
    def fingerprint(self) -> str:
        """Hash of the file."""
        return f"jsonl {digest(self._bytes)}"


class RowList:
    """Rows in memory, from a JSON file, from text files or from Python; `places` names them in messages."""

    def __init__(
        self,
        rows: Sequence[Row | InputError],
        name: str,
        places: Sequence[str] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Rows, an error in the place of one that cannot be read; it is raised when that is asked for."""
        self._rows, self.name, self._places, self._fingerprint = rows, name, places, fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Row:
        row = self._rows[index]
        if isinstance(row, InputError):
            raise row
        if not isinstance(row, Mapping):
            raise InputError(f"the row is not an object: {row!r:.60}", where=self.where(index))
        return row

    def read(self, begin: int, end: int) -> list[Row]:
        """Rows begin ... end."""
        return [self[index] for index in range(begin, end)]

    def where(self, index: int) -> str:
        """Source and row number, or the row's own place."""
        return self._places[index] if self._places else f"{self.name} row {index + 1}"

    @property
    def fingerprint(self) -> str:
        """Hash of the file that they are from, or of the rows as JSON, keys in their order: templates write them so."""
        if self._fingerprint is None:
            try:
                self._fingerprint = f"rows {digest(json.dumps(list(self._rows), default=as_json).encode())}"
            except RecursionError:
                raise InputError("a row is nested too deeply", where=self.name) from None
        return self._fingerprint


class Chained:
    """The rows of several files as those of one source."""

    def __init__(self, files: Sequence[Rows], name: str) -> None:
        self.name, self._files = name, list(files)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self._files)])

    def _located(self, index: int) -> tuple[Rows, int]:
        at = int(np.searchsorted(self._ends, index, side="right")) - 1
        return self._files[at], index - int(self._ends[at])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int, /) -> Row:
        file, at = self._located(index)
        return file[at]

    def read(self, begin: int, end: int) -> list[Row]:
        """Rows begin ... end."""
        rows: list[Row] = []
        while begin < end:
            file, at = self._located(begin)
            count = min(end - begin, len(file) - at)
            rows += file.read(at, at + count)
            begin += count
        return rows

    def where(self, index: int) -> str:
        """The place in its own file."""
        file, at = self._located(index)
        return file.where(at)

    @property
    def fingerprint(self) -> str:
        """Of all files."""
        return digest("\n".join(file.fingerprint for file in self._files).encode())
