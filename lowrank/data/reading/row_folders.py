"""Which files of a folder are rows: of one kind, and of the split asked for where their names say splits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lowrank.data.reading.data_files import TEXTS, kind_of
from lowrank.errors import InputError

# How the files of a split are called, as data sets on hubs call them.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Texts that describe a data set, and what tools keep beside it.
ABOUT = ("readme", "license", "licence", "changelog", "citation", "notice", "contributing")
INFO = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def data_files(folder: Path, split: str, kinds: Sequence[str]) -> list[Path]:
    """The files with rows in a folder and those below it, sorted by name.

    Args:
        folder: The folder; what begins with a dot or two underscores is passed over.
        split: Taken where files or folders are named after splits: `test.jsonl`, `data/train-00000-of-00002.parquet`.
        kinds: The endings of files that can be read.

    Raises:
        InputError: there is none, there are several kinds, or the split is not there.
    """
    inside = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    seen = [path for path in inside if not any(part.startswith((".", "__")) for part in path.parts)]
    found = [path for path in seen if kind_of(path) in kinds and not _is_about(path)]
    if not found:
        what = "the folder holds neither a saved data set nor files with rows"
        raise InputError(what, where=str(folder), fix=f"Known endings: {', '.join(kinds)}.")
    several = sorted({"text" if kind_of(path) in TEXTS else kind_of(path) for path in found})
    if len(several) > 1:
        raise InputError(
            f"the folder holds files of several kinds: {', '.join(several)}",
            where=str(folder),
            fix=f"Name those with the rows, such as {folder}/*{several[0] if several[0] != 'text' else '.txt'}.",
        )
    return [folder / path for path in (found if several == ["text"] else _of_split(found, split, folder))]


def _is_about(path: Path) -> bool:
    return path.name in INFO or (kind_of(path) in TEXTS and path.stem.lower() in ABOUT)


def _of_split(files: list[Path], split: str, folder: Path) -> list[Path]:
    named = {path: split_of(path) for path in files}
    splits = sorted({name for name in named.values() if name is not None})
    if not splits:
        return files
    without = [path for path, name in named.items() if name is None]
    if without:
        raise InputError(
            f"some files are named after splits ({', '.join(splits)}), others are not: {without[0]}",
            where=str(folder),
            fix=f"Name the files that you mean, such as {folder}/{files[0]}.",
        )
    asked = next((name for name, words in SPLITS.items() if split in words), split)
    if asked not in splits:
        raise InputError(f"the folder has no split {split!r}", where=str(folder), fix=f"Splits: {', '.join(splits)}.")
    return [path for path, name in named.items() if name == asked]


def split_of(path: Path) -> str | None:
    """The split that a file's name, or else the name of a folder above it, stands for; None if neither does."""
    for part in (path.stem, *reversed(path.parts[:-1])):
        words = re.split(r"[^a-z]+", part.lower())
        for name, known in SPLITS.items():
            if any(word in words for word in known):
                return name
    return None
