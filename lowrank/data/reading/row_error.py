"""The error of one row, before it is known where that row lies."""

from __future__ import annotations


class RowError(Exception):
    """A row cannot be used; whoever knows its file and number turns this into an `InputError`."""

    def __init__(self, what: str, fix: str | None = None) -> None:
        self.what, self.fix = what, fix
        super().__init__(what)

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str | None]]:
        return RowError, (self.what, self.fix)
