"""How each kind of source is read: by the ending of a file, by what lies in a folder, or by name from a hub.

A new kind of file is one line in `FILES`. What is read is decided by what the files hold: none of it is cached.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank.data.reading.data_files import COMPRESSED, content_of, decoded, glance, kind_of, lines, parsed_json
from lowrank.data.reading.row_error import RowError
from lowrank.data.reading.row_folders import data_files
from lowrank.data.reading.rows import Chained, JsonLines, Row, RowList, Rows, digest, parsed_line
from lowrank.data.reading.tables import (
    GROUP_ROWS,
    arrow_rows,
    csv_rows,
    csv_table,
    dataset_rows,
    parquet_rows,
    plain_rows,
)
from lowrank.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


# A row, or why it cannot be read, and the place to name when it is wrong.
Placed = tuple[Row | InputError, str]

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")


def _read_json(path: Path) -> Rows:
    """The rows of a JSON file: a list of objects, an object with such a list under `data` or `rows`, or JSON lines."""
    content, name = content_of(path), str(path)
    text = decoded(bytes(content), name)
    try:
        value = parsed_json(text, "the file is")
    except RowError as error:
        if "Extra data" in error.what and text.lstrip().startswith("{"):
            return JsonLines(content, name)
        raise InputError(error.what, where=name, fix=error.fix) from None
    if isinstance(value, dict):
        value = value.get("data", value.get("rows"))
    if not isinstance(value, list):
        raise InputError("the file holds no list of rows", where=name, fix="Expected [{...}, {...}, ...].")
    return RowList(value, name, fingerprint=f"json {digest(content)}")


def _read_text(path: Path) -> Rows:
    """One text file as one row `{"text": ...}`."""
    return RowList([{"text": decoded(bytes(content_of(path)), str(path))}], str(path), [str(path)])


def _read_csv(delimiter: str, path: Path) -> Rows:
    content = content_of(path)
    found = iter(BytesIO(content)) if isinstance(content, bytes) else iter(content.readline, b"")
    return csv_table(found, str(path), delimiter, lambda: f"csv {delimiter} {digest(content)}")


FILES: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": lambda path: JsonLines(content_of(path), str(path)),
    ".ndjson": lambda path: JsonLines(content_of(path), str(path)),
    ".json": _read_json,
    ".csv": partial(_read_csv, DELIMITERS[".csv"]),
    ".tsv": partial(_read_csv, DELIMITERS[".tsv"]),
    ".parquet": lambda path: parquet_rows(content_of(path), str(path)),
    ".arrow": lambda path: arrow_rows([content_of(path)], str(path)),
    ".feather": lambda path: arrow_rows([content_of(path)], str(path)),
    ".txt": _read_text,
    ".md": _read_text,
}


def open_rows(path: str, split: str, subset: str | None) -> Rows:
    """The rows of a file, of several, of a folder, or of a data set of a hub.

    Args:
        path: A file, compressed or not; a pattern such as `data/*.jsonl`; a folder of files, or one that
            `Dataset.save_to_disk` wrote; or a name on a hub.
        split: Which split of a data set that has several.
        subset: Which configuration of a data set on a hub.

    Raises:
        InputError: there is no such thing, or it cannot be read.
    """
    local = Path(path).expanduser()
    if saved := _saved(local, split):
        return saved
    files = _local_files(path, split)
    if files is None:
        return dataset_rows(_load_from_hub(path, split, subset), f"{path} ({split})")
    opened = [FILES[kind_of(file)](file) for file in files]
    return opened[0] if len(opened) == 1 else Chained(opened, path)


def _local_files(path: str, split: str) -> list[Path] | None:
    """The files that a path stands for, in order; None if it is the name of a data set on a hub.

    Raises:
        InputError: there is no such file, or one cannot be read.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        files = data_files(local, split, tuple(FILES))
    elif local.is_file():
        files = [local]
    elif glob.has_magic(path):
        files = [Path(name) for name in sorted(glob.glob(str(local), recursive=True)) if Path(name).is_file()]
        if not files:
            raise InputError(f"no file is called so: {path}", where="data", fix="Paths start from where you are.")
    elif kind_of(local) in FILES or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise InputError(f"there is no such file: {local}", where="data", fix="Paths start from where you are.")
    else:
        return None
    for file in files:
        if kind_of(file) not in FILES:
            known = f"{', '.join(FILES)}; compressed: {', '.join(COMPRESSED)}"
            raise InputError("cannot read such files", where=str(file), fix=f"Known endings: {known}.")
    return files


def stream_fingerprint(path: str, split: str, subset: str | None) -> str:
    """What tells a source of a stream from another: its files by a glance into each, what is on a hub by name."""
    local = Path(path).expanduser()
    saved = sorted(local.rglob("*.arrow")) if _saved(local, split) else None
    files = saved or _local_files(path, split)
    return f"{path} {subset} {split} {' '.join(map(glance, files or ()))}"


def stream_rows(path: str, split: str, subset: str | None) -> Iterator[Placed]:
    """The rows of a source one after another, each with its place, none kept.

    Raises:
        InputError: as `open_rows`, but for single rows, which are given in their row's place.
    """
    saved = _saved(Path(path).expanduser(), split)
    files = None if saved else _local_files(path, split)
    if saved:
        yield from _one_by_one(saved)
    elif files is None:
        rows = _streamed_from_hub(path, split=split, subset=subset)
        yield from ((row, f"{path} row {number}") for number, row in enumerate(rows, start=1))
    else:
        for file in files:
            yield from _streamed(file)


def _streamed(file: Path) -> Iterator[Placed]:
    kind, name = kind_of(file), str(file)
    if kind in JSON_LINES:
        yield from ((_line(line, name, number), f"{name}:{number}") for number, line in enumerate(lines(file), start=1))
    elif kind in DELIMITERS:
        yield from ((row, f"{name}:{line}") for row, line in csv_rows(lines(file), name, DELIMITERS[kind]))
    else:
        yield from _one_by_one(FILES[kind](file))


def _line(line: bytes, name: str, number: int) -> Row | InputError:
    try:
        return parsed_line(line, name, number)
    except InputError as error:
        return error


def _one_by_one(rows: Rows) -> Iterator[Placed]:
    for index in range(len(rows)):
        try:
            yield rows[index], rows.where(index)
        except InputError as error:
            yield error, rows.where(index)


def _streamed_from_hub(path: str, *, split: str, subset: str | None) -> Iterator[Row]:
    import datasets

    try:
        stream = datasets.load_dataset(path, subset, split=split, streaming=True)
        tables = stream.with_format("arrow").iter(batch_size=GROUP_ROWS)
    except (ValueError, OSError) as error:
        raise _unreachable(path, error) from None
    read = 0
    while True:
        try:
            table = next(tables, None)
        except (ValueError, OSError) as error:  # damaged, or a connection that broke
            raise InputError(f"cannot be read on from row {read + 1}: {error}", where=path) from None
        if table is None:
            return
        read += len(table)
        yield from plain_rows(table)


def _unreachable(path: str, error: Exception) -> InputError:
    return InputError(
        f"{path!r} is no file here, and cannot be loaded from a hub: {error}",
        where="data",
        fix="Look at the spelling; without a network only local files work.",
    )


def _saved(path: Path, split: str) -> Rows | None:
    """The rows of a folder that `save_to_disk` wrote; None if it is none."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
        if split not in splits:
            raise InputError(f"the data set has no split {split!r}", where=str(path), fix=f"Splits: {splits}.")
        return _saved(path / split, split)
    if not (path / "state.json").is_file() or not (path / "dataset_info.json").is_file():
        return None
    state = json.loads((path / "state.json").read_bytes())
    return arrow_rows([content_of(path / file["filename"]) for file in state["_data_files"]], str(path))


def _load_from_hub(path: str, split: str, subset: str | None) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        loaded = datasets.load_dataset(path, subset, split=split)
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise _unreachable(path, error) from None
    assert isinstance(loaded, datasets.Dataset)
    return loaded
