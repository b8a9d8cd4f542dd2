"""Rows of one source, read when they are asked for, each with the place to name when it is wrong."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lowrank.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]


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


def mapped(path: Path) -> bytes | mmap.mmap:
    """The bytes of a file, read when they are looked at."""
    if not path.stat().st_size:
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def digest(content: bytes | mmap.mmap) -> str:
    """A hash of bytes, as 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def parsed_line(line: bytes, where: str) -> Row:
    """The row in one line of a JSONL file; a blank line is a row without keys.

    Raises:
        InputError: the line is not a JSON object.
    """
    if not line.strip():
        return {}
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"the line is not valid JSON: {error}", where=where) from None
    if not isinstance(row, dict):
        raise InputError(f"the line is not a JSON object: {line[:60].decode(errors='replace')!r}", where=where)
    return row


class JsonLines:
    """A JSONL file, mapped into memory; a line is parsed when its row is asked for. Row i is line i + 1."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._bytes = mapped(path)

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
        return parsed_line(self._bytes[self._starts[index] : self._starts[index + 1]], self.where(index))

    def read(self, begin: int, end: int) -> list[Row]:
        """Rows begin ... end."""
        return [self[index] for index in range(begin, end)]

    def where(self, index: int) -> str:
        """File and line."""
        return f"{self.name}:{index + 1}"

    @property
    def fingerprint(self) -> str:
        """Hash of the file."""
        return digest(self._bytes)


class RowList:
    """Rows in memory, from a JSON file, from text files or from Python; `places` names them in messages."""

    def __init__(self, rows: Sequence[Row], name: str, places: Sequence[str] | None = None) -> None:
        self._rows, self.name, self._places = rows, name, places

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Row:
        row = self._rows[index]
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
        """Hash of the rows as JSON."""
        return digest(json.dumps(list(self._rows), sort_keys=True, default=str).encode())


class DatasetRows:
    """Rows of a `datasets` data set, loaded when the first row is asked for.

    A table has every key in every row, filled up with None inside nested objects; those are left out again, as they
    were never in the data (an argument of a tool call whose value really is null goes with them).
    """

    def __init__(self, load: Callable[[], Dataset], name: str, fingerprint: str | None = None) -> None:
        """Rows of what `load` returns; `fingerprint` where it is known without loading."""
        self._load, self.name, self._fingerprint = load, name, fingerprint

    @cached_property
    def _dataset(self) -> Dataset:
        return self._load()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int, /) -> Row:
        return {key: without_none(value) for key, value in self._dataset[index].items()}

    def read(self, begin: int, end: int) -> list[Row]:
        """Rows begin ... end."""
        columns = self._dataset[begin:end]
        return [{key: without_none(column[at]) for key, column in columns.items()} for at in range(end - begin)]

    def where(self, index: int) -> str:
        """Source and row number."""
        return f"{self.name} row {index + 1}"

    @property
    def fingerprint(self) -> str:
        """The data set's own fingerprint, or the hash of the files it is read from."""
        return self._fingerprint or self._dataset._fingerprint


def without_none(value: Any) -> Any:
    """The value without the None-valued keys of the objects inside it."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value
