"""The errors a user sees: what is wrong, where, and what to do about it.

`InputError` means that what the user gave is wrong (the command line exits with 2), `JobError` that the job itself
failed (exit code 1). Anything else that escapes is a bug of this project.
"""

from __future__ import annotations

# What `git lfs` leaves where a file should be begins so; models and data both meet it.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class LowrankError(Exception):
    """Base of both kinds of error.

    Args:
        what: What is wrong, as one sentence that names the thing.
        where: File, line, key, module or row that it was found at.
        fix: What the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        located = f"{where}: {what}" if where else what
        super().__init__(f"{located}\n{fix}" if fix else located)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.fix)


class JobError(LowrankError):
    """The input was right, the job failed: a full disk, a diverged loss, a failed self-test."""


class InputError(LowrankError, ValueError):
    """What the user gave cannot be used."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """What another library's error says first; its class's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _rebuild(kind: type[LowrankError], what: str, where: str | None, fix: str | None) -> LowrankError:
    return kind(what, where=where, fix=fix)
