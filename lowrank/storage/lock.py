"""A run's folder belongs to one run at a time: a lock that goes with the process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowrank.errors import InputError

FILE = ".lock"
"""Locked in the folder's place where folders cannot be: on NFS, which locks only what is open for writing."""

_TRIES, _MOMENT = 20, 0.01
_held: set[int] = set()


def _let_go_in_child() -> None:
    """A child's copy would hold the lock of a parent that has died."""
    for number in _held:
        os.close(number)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def held(folder: Path, told: Callable[[str], object] = print) -> Iterator[None]:
    """Makes the folder where it is missing, and holds it; if nothing was written by the end, it is gone again.

    The kernel lets go of the lock when the process ends or is killed, so nothing that a dead run leaves stands in the
    way of the next one. A file system that knows no locks is told of.

    Args:
        folder: Of a run.
        told: Shows a person a line.

    Raises:
        InputError: another run is at work in it, or it cannot be written to.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        number = _locked(folder, told)
    except OSError as error:
        _remove(made)
        raise _unfit(folder, error) from error
    _held.add(number)
    try:
        _try_to_write(folder)
        yield
    finally:
        with suppress(OSError):
            (folder / FILE).unlink(missing_ok=True)
        _remove(made)
        _held.discard(number)
        os.close(number)


def holder(folder: Path) -> str | None:
    """Who is at work in a run's folder ("process 7", "another process"); None where nobody is."""
    for path in (folder, folder / FILE):
        try:
            number = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _who(number)
        except OSError:
            continue
        finally:
            os.close(number)
    return None


def _locked(folder: Path, told: Callable[[str], object]) -> int:
    """A descriptor that holds the lock, of the folder or of a file in it."""
    while True:
        number = _opened(folder, folder, os.O_RDONLY)
        refused = _flock(number, folder)
        if refused is not None and refused.errno == errno.EBADF:
            os.close(number)
            number = _opened(folder, folder / FILE, os.O_RDWR | os.O_CREAT)
            refused = _flock(number, folder)
        if refused is not None:
            told(f"warning: {folder} cannot be locked ({refused.strerror}); see to it that no other run writes there.")
            return number
        if any(_is(path, number) for path in (folder, folder / FILE)):
            return number
        os.close(number)  # the run before has removed it in between


def _opened(folder: Path, path: Path, how: int) -> int:
    for _ in range(_TRIES):
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the run before has removed the folder in between
            return os.open(path, how, 0o644)
    return os.open(path, how, 0o644)


def _flock(number: int, folder: Path) -> OSError | None:
    """Takes the lock; why the file system cannot give it, if so. Raises InputError where another one has it."""
    for left in reversed(range(_TRIES)):
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if left:
                time.sleep(_MOMENT)  # `holder` may have it for a moment
                continue
            who = _who(number)
            os.close(number)
            raise InputError(
                f"a run is at work in {folder} ({who}); nothing in it was changed",
                where="training.output_dir",
                fix="Wait until it has ended, or give another folder.",
            ) from None
        except OSError as error:
            return error
        break
    return None


def _who(number: int) -> str:
    """The process that has the lock on an open file, as far as the kernel lets this one know."""
    place = os.fstat(number)
    name = f"{os.major(place.st_dev):02x}:{os.minor(place.st_dev):02x}:{place.st_ino}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            if f" {name} " in line and " WRITE " in line and int(line.split()[4]) > 0:
                return f"process {line.split()[4]}"
    return "another process"


def _is(path: Path, number: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(number))
    except FileNotFoundError:
        return False


def _try_to_write(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"?")
    except OSError as error:
        raise _unfit(folder, error) from error


def _remove(made: list[Path]) -> None:
    """The folders of these that are empty, the innermost first."""
    for path in made:
        with suppress(OSError):
            path.rmdir()


def _unfit(folder: Path, error: OSError) -> InputError:
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    what = str(error.strerror).lower() if above.is_dir() else f"{above} is no folder"
    return InputError(
        f"{folder} cannot be written to: {what}",
        where="training.output_dir",
        fix="Give another folder, or make room or rights there.",
    )
