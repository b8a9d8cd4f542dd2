"""Folders that appear under their name when they are complete, and never otherwise."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from lowrank.errors import InputError, JobError


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """An empty folder to write into; it becomes `path` when the block ends well and vanishes when it does not.

    Leftovers of runs that were killed are removed. Two runs at once do not touch each other's folder.

    Raises:
        InputError: `path` exists and is not an empty folder.
        JobError: The disk is full or cannot be written.
    """
    refuse_occupied(path)
    with _beside(path) as work:
        yield work
        _sync_all(work)
        refuse_occupied(path)
        os.rename(work, path)
        sync(path.parent)


@contextmanager
def new_file(path: Path) -> Generator[Path]:
    """A place to write a file to; it becomes `path` when the block ends well and vanishes when it does not.

    Raises:
        InputError: There is something of that name.
        JobError: The disk is full or cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise InputError("the file exists", where=str(path), fix="Choose another name.")
    with _beside(path) as work:
        file = work / path.name
        yield file
        sync(file)
        os.rename(file, path)
        sync(path.resolve().parent)


@contextmanager
def into_folder(path: Path, *, last: str, overwrite: bool) -> Generator[Path]:
    """Like `new_folder`, but `path` may hold other files: the written ones move in beside them, `last` at the end.

    `last` is the file that makes the folder what it is (`adapter_config.json`). An old one is removed before the
    others are replaced: a crash between leaves a folder that is visibly incomplete, never a mixture.

    Raises:
        InputError: `path` is a file, or holds `last` already and `overwrite` is false.
        JobError: The disk is full or cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise InputError("the output is a file; a folder is written", where=str(path))
    if (path / last).exists() and not overwrite:
        raise InputError(
            f"the folder already holds {last}", where=str(path), fix="Choose another folder, or pass overwrite=True."
        )
    with _beside(path) as work:
        yield work
        _sync_all(work)
        if not path.exists():
            os.rename(work, path)
            sync(path.parent)
            return
        (path / last).unlink(missing_ok=True)
        for file in sorted(work.iterdir(), key=lambda file: file.name == last):
            if (path / file.name).is_dir():
                shutil.rmtree(path / file.name)
            os.replace(file, path / file.name)
        sync(path)
        work.rmdir()


def refuse_occupied(path: Path, fix: str = "Choose another folder.") -> None:
    """InputError when `path` is a file or a folder with something in it; `fix` says what to do."""
    if path.is_dir():
        if next(path.iterdir(), None) is not None:
            raise InputError("the output folder exists and is not empty", where=str(path), fix=fix)
    elif path.exists() or path.is_symlink():
        raise InputError("the output exists and is not a folder", where=str(path), fix=fix)


def refuse_inside(out: Path, source: Path) -> None:
    """InputError when `out` is `source`, lies in it, or holds it."""
    inner, outer = out.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise InputError(
            f"the output {out} and the input {source} lie in one another", fix="Choose a folder outside the input."
        )


def require_space(path: Path, size: int) -> None:
    """JobError when the disk that `path` will lie on has less than `size` bytes free."""
    place = path.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise JobError(
            f"{size / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free",
            where=str(place),
            fix="Make room or choose a folder on another disk.",
        )


@contextmanager
def _beside(path: Path) -> Generator[Path]:
    path = path.resolve()
    prefix = f".{path.name}.incomplete-"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(prefix.replace("[", "[[]") + "*"):
            _remove_unless_held(stale)
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
        work.chmod(0o777 & ~_umask())
    except OSError as error:
        raise JobError(f"cannot write: {error.strerror}", where=str(path.parent)) from error
    held = os.open(work, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield work
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise JobError("the disk is full", where=str(path.parent), fix="Make room and run it again.") from error
        raise
    finally:
        os.close(held)
        shutil.rmtree(work, ignore_errors=True)


def _remove_unless_held(stale: Path) -> None:
    fd = os.open(stale, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    finally:
        os.close(fd)
    shutil.rmtree(stale)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_all(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        for name in files:
            sync(Path(place, name))
        sync(Path(place))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
