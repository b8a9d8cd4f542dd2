"""Rows of tables (Parquet, Arrow, CSV, `datasets`), read as they stand: no type is guessed, nothing is cached.

Images and sound are not decoded: they stay the bytes and paths that they are stored as.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lowrank.data.reading.data_files import decoded
from lowrank.data.reading.rows import Row, RowList, Rows, digest
from lowrank.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

# Rows of a data set or a CSV file that are taken out of Arrow, or put into it, at a time.
GROUP_ROWS = 1000


class TableRows:
    """Rows of a table that is read group by group, the last few groups kept.

    A table has every key in every row, filled up with None inside nested objects; those are left out again, as they
    were never in the data (an argument of a tool call whose value really is null goes with them).
    """

    def __init__(
        self,
        name: str,
        sizes: Sequence[int],
        group: Callable[[int], pa.Table],
        fingerprint: Callable[[], str],
        *,
        lines: Sequence[int] | None = None,
        faults: Mapping[int, InputError] | None = None,
    ) -> None:
        """Look at a table.

        Args:
            name: What messages call it.
            sizes: Rows in each group.
            group: Reads one group.
            fingerprint: A hash of what is in the table.
            lines: The line of the file that each row begins at, where it has lines.
            faults: Rows that could not be read, and why.
        """
        self.name, self._fingerprint, self._lines, self._faults = name, fingerprint, lines, faults or {}
        self._ends = np.cumsum([0, *sizes])
        self._group = lru_cache(maxsize=2)(group)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int, /) -> Row:
        return self.read(index, index + 1)[0]

    def read(self, begin: int, end: int) -> list[Row]:
        """Rows begin ... end. Raises InputError where one of them could not be read."""
        for index in range(begin, end) if self._faults else ():
            if index in self._faults:
                raise self._faults[index]
        rows: list[Row] = []
        while begin < end:
            at = int(np.searchsorted(self._ends, begin, side="right")) - 1
            first, last = int(self._ends[at]), int(self._ends[at + 1])
            rows += plain_rows(self._group(at).slice(begin - first, min(end, last) - begin))
            begin = min(end, last)
        return rows

    def where(self, index: int) -> str:
        """File and line, or source and row number."""
        return f"{self.name} row {index + 1}" if self._lines is None else f"{self.name}:{self._lines[index]}"

    @property
    def fingerprint(self) -> str:
        """Changes when the content does."""
        return self._fingerprint()


def plain_rows(table: pa.Table) -> list[Row]:
    """The rows of a table as Python values."""
    columns = {name: _plain(column) for name, column in zip(table.column_names, table.columns, strict=True)}
    return [{name: column[at] for name, column in columns.items()} for at in range(len(table))]


def _plain(column: pa.ChunkedArray) -> list[Any]:
    values = column.to_pylist()
    if _holds_json(column.type):
        return [_without_none(_from_json(value, column.type)) for value in values]
    return [_without_none(value) for value in values] if pa.types.is_nested(column.type) else values


def _holds_json(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.JsonType) or any(_holds_json(kind.field(at).type) for at in range(kind.num_fields))


def _from_json(value: Any, kind: pa.DataType) -> Any:
    """The value with what its type says is JSON text read as JSON (`datasets` stores objects of mixed types so)."""
    if isinstance(kind, pa.JsonType) and isinstance(value, str):
        return json.loads(value)
    if isinstance(value, dict):
        return {key: _from_json(item, kind.field(key).type) for key, item in value.items()}
    if isinstance(value, list) and kind.num_fields:
        return [_from_json(item, kind.field(0).type) for item in value]
    return value


def _without_none(value: Any) -> Any:
    """The value without the None-valued keys of the objects inside it."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def parquet_rows(content: Any, name: str) -> TableRows:
    """The rows of a Parquet file, group by group as the file has them."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pa.py_buffer(content))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cannot be read as Parquet: {error}", where=name) from None
    sizes = [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)]

    def group(at: int) -> pa.Table:
        try:
            return file.read_row_group(at, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"cannot be read on from row {sum(sizes[:at]) + 1}: {error}", where=name) from None

    return TableRows(name, sizes, group, lambda: f"parquet {digest(content)}")


def arrow_rows(contents: Sequence[Any], name: str) -> TableRows:
    """The rows of Arrow files, one file after another."""
    batches: list[pa.RecordBatch] = []
    for content in contents:
        open_file = pa.ipc.open_file if content[:6] == b"ARROW1" else pa.ipc.open_stream
        try:
            batches += open_file(pa.py_buffer(content)).read_all().to_batches()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"cannot be read as Arrow: {error}", where=name) from None
    return TableRows(
        name,
        [len(batch) for batch in batches],
        lambda at: pa.Table.from_batches([batches[at]]),
        lambda: f"arrow {' '.join(map(digest, contents))}",
    )


def dataset_rows(dataset: Dataset, name: str) -> Rows:
    """The rows of a data set of the library `datasets`, as they are stored; through its transform if it has one."""
    if dataset.format["type"] == "custom":
        return RowList([dataset[at] for at in range(len(dataset))], name)
    stored = dataset.with_format("arrow", columns=dataset.format["columns"])
    starts = range(0, len(stored), GROUP_ROWS)

    def group(at: int) -> pa.Table:
        return stored[starts[at] : starts[at] + GROUP_ROWS]

    def content() -> str:
        parts = (batch for at in range(len(starts)) for batch in group(at).combine_chunks().to_batches())
        return "dataset " + digest("".join(digest(batch.serialize()) for batch in parts).encode())

    return TableRows(name, [min(GROUP_ROWS, len(stored) - start) for start in starts], group, content)


def csv_table(lines: Iterator[bytes], name: str, delimiter: str, fingerprint: Callable[[], str]) -> TableRows:
    """The rows of a CSV file: every cell is the text that it is, an empty one too.

    Raises:
        InputError: the header cannot be used, or the file is no UTF-8.
    """
    begins: list[int] = []
    faults: dict[int, InputError] = {}
    groups: list[pa.Table] = []
    read = csv_rows(lines, name, delimiter)
    while some := list(islice(read, GROUP_ROWS)):
        faults |= {len(begins) + at: row for at, (row, _) in enumerate(some) if isinstance(row, InputError)}
        begins += [line for _, line in some]
        rows = [{} if isinstance(row, InputError) else row for row, _ in some]
        names = next((list(row) for row in rows if row), [""])
        groups.append(pa.table({key: pa.array([row.get(key) for row in rows], pa.large_string()) for key in names}))
    sizes = [len(group) for group in groups]
    return TableRows(name, sizes, groups.__getitem__, fingerprint, lines=begins, faults=faults)


def csv_rows(lines: Iterator[bytes], name: str, delimiter: str) -> Iterator[tuple[Mapping[str, str] | InputError, int]]:
    """Each row of a CSV file, or what is wrong with it, and the line that it begins at; blank lines are none.

    Raises:
        InputError: the header cannot be used, or the file is no UTF-8.
    """
    csv.field_size_limit(sys.maxsize)
    texts = (decoded(line, name, number) for number, line in enumerate(lines, start=1))
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fix = 'A cell that begins with a quote is quoted, and quotes in it are doubled: """so"" it is".'
            yield InputError(f"not valid CSV: {error}", where=f"{name}:{begin}", fix=fix), begin
            continue
        if not cells:
            continue
        if not header:
            header = _header(cells, name, delimiter)
        elif len(cells) == len(header):
            yield dict(zip(header, cells, strict=True)), begin
        else:
            what = f"the row has {len(cells)} cells, the header {len(header)}"
            yield InputError(what, where=f"{name}:{begin}", fix="Put a cell with the delimiter in it in quotes."), begin


def _header(cells: list[str], name: str, delimiter: str) -> list[str]:
    other = (
        next((mark for mark in ",;\t|" if mark != delimiter and mark in cells[0]), None) if len(cells) == 1 else None
    )
    if other is not None:
        fix = "Name the file .tsv." if other == "\t" else "Save it with commas, or with tabs as .tsv."
        fix = "Name the file .csv." if other == "," else fix
        raise InputError(f"the cells are separated by {other!r}, not by {delimiter!r}", where=f"{name}:1", fix=fix)
    doubled = [cell for cell in cells if cells.count(cell) > 1]
    if doubled:
        raise InputError(f"two columns are called {doubled[0]!r}", where=f"{name}:1", fix="Name them apart.")
    return cells
