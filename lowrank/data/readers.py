"""How each kind of source is read: by the ending of a file, by what lies in a folder, or by name from a hub.

A new kind of file is one line in `FILES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank.data.rows import DatasetRows, JsonLines, Row, RowList, Rows, digest, mapped, parsed_line, without_none
from lowrank.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


# A row and the place to name when it is wrong.
Placed = tuple[Row, str]


def read_json(path: Path) -> Rows:
    """The rows of a JSON file: a list of objects, or an object with such a list under `data` or `rows`."""
    try:
        value = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not valid JSON: {error}", where=str(path), fix="JSON lines? Name it .jsonl.") from None
    if isinstance(value, dict):
        value = value.get("data", value.get("rows"))
    if not isinstance(value, list):
        raise InputError("the file holds no list of rows", where=str(path), fix="Expected [{...}, {...}, ...].")
    return RowList(value, str(path))


def read_text(path: Path) -> Rows:
    """One text file as one row `{"text": ...}`."""
    return _documents([path], str(path))


def _documents(paths: Iterable[Path], name: str) -> Rows:
    paths = sorted(paths)
    try:
        rows = [{"text": path.read_text(encoding="utf-8-sig")} for path in paths]
    except UnicodeDecodeError as error:
        raise InputError(f"a file is not UTF-8 text: {error}", where=name) from None
    return RowList(rows, name, [str(path) for path in paths])


def _table_file(kind: str, path: Path) -> Rows:
    return DatasetRows(partial(_load_table, kind, path), str(path), digest(mapped(path)))


def _load_table(kind: str, path: Path) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise InputError(f"cannot be read as {kind}: {error.__cause__ or error}", where=str(path)) from None


FILES: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": read_json,
    ".csv": partial(_table_file, "csv"),
    ".parquet": partial(_table_file, "parquet"),
    ".txt": read_text,
    ".md": read_text,
}


def open_rows(path: str, split: str, subset: str | None) -> Rows:
    """The rows of a file, a folder, or a data set of a hub.

    Args:
        path: A file; a folder that `Dataset.save_to_disk` wrote, or of text files; or a name on a hub.
        split: Which split of a data set that has several.
        subset: Which configuration of a data set on a hub.

    Raises:
        InputError: there is no such thing, or it cannot be read.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return _folder(local, split)
    if local.is_file():
        reader = FILES.get(local.suffix.lower())
        if reader is None:
            raise InputError("cannot read such files", where=str(local), fix=f"Known endings: {', '.join(FILES)}.")
        return reader(local)
    if local.suffix.lower() in FILES or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise InputError(f"there is no such file: {local}", where="data", fix="Paths start from where you are.")
    return DatasetRows(partial(_load_from_hub, path, split, subset), f"{path} ({split})")


def stream_rows(path: str, split: str, subset: str | None) -> Iterator[Placed]:
    """The rows of a source one after another, each with its place, none kept.

    Raises:
        InputError: as `open_rows`.
    """
    local = Path(path).expanduser()
    if local.suffix.lower() in (".jsonl", ".ndjson") and local.is_file():
        with local.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield parsed_line(line, f"{local}:{number}"), f"{local}:{number}"
        return
    if local.suffix.lower() == ".parquet" and local.is_file():
        rows = _streamed("parquet", split="train", name=path, data_files=str(local))
    elif local.exists() or local.suffix.lower() in FILES:
        opened = open_rows(path, split, subset)
        yield from ((opened[index], opened.where(index)) for index in range(len(opened)))
        return
    else:
        rows = _streamed(path, split=split, name=path, subset=subset)
    for number, row in enumerate(rows, start=1):
        yield {key: without_none(value) for key, value in row.items()}, f"{path} row {number}"


def _streamed(
    path: str, *, split: str, name: str, subset: str | None = None, data_files: str | None = None
) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        rows = iter(datasets.load_dataset(path, subset, split=split, data_files=data_files, streaming=True))
    except (ValueError, OSError) as error:
        if data_files is None:
            raise _unreachable(path, error) from None
        raise InputError(f"cannot be read as {path}: {error}", where=name) from None
    for number in count(1):
        try:
            row = next(rows, None)
        except (ValueError, OSError) as error:  # damaged, or a connection that broke
            raise InputError(f"cannot be read on from row {number}: {error}", where=name) from None
        if row is None:
            return
        yield row


def _unreachable(path: str, error: Exception) -> InputError:
    return InputError(
        f"{path!r} is no file here, and cannot be loaded from a hub: {error}",
        where="data",
        fix="Look at the spelling; without a network only local files work.",
    )


def _folder(path: Path, split: str) -> Rows:
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
        if split not in splits:
            raise InputError(f"the data set has no split {split!r}", where=str(path), fix=f"Splits: {splits}.")
        return _folder(path / split, split)
    if (path / "state.json").exists():
        fingerprint = json.loads((path / "state.json").read_bytes())["_fingerprint"]
        return DatasetRows(partial(_load_saved, path), str(path), fingerprint)
    texts = [file for file in path.rglob("*") if file.suffix.lower() in (".txt", ".md")]
    if not texts:
        raise InputError(
            "the folder holds neither a saved data set nor text files", where=str(path), fix="Name a file in it."
        )
    return _documents(texts, str(path))


def _load_saved(path: Path) -> Dataset:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def _load_from_hub(path: str, split: str, subset: str | None) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        loaded: Dataset | DatasetDict = datasets.load_dataset(path, subset, split=split)
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise _unreachable(path, error) from None
    assert isinstance(loaded, datasets.Dataset)
    return loaded
