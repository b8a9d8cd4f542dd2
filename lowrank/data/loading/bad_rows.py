"""What becomes of rows that cannot be used: the run is refused, or they are left out, counted and listed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from lowrank.data.examples.token_table import Outcome, TokenTable
from lowrank.data.reading.sources import Joined
from lowrank.data.supervision.tokenise import Tokeniser
from lowrank.errors import InputError

LISTED = 10
MOST = 0.05
# After the first bad row, the others are counted for so many seconds.
PATIENCE = 10.0


def watched(parts: Iterator[TokenTable], rows: Joined, tokeniser: Tokeniser) -> Iterator[TokenTable]:
    """Tables as they come, until one holds a bad row.

    Raises:
        InputError: names the first bad row, and how many there are.
    """
    bad: list[int] = []
    seen, until = 0, 0.0
    for part in parts:
        found = seen + np.flatnonzero(part.outcomes == Outcome.BAD)
        until = until if bad or not len(found) else time.monotonic() + PATIENCE
        bad += found.tolist()
        seen += len(part.outcomes)
        if not bad:
            yield part
        elif time.monotonic() > until:
            break
    if bad:
        raise refusal(bad, seen, rows, tokeniser)


def left_out(bad: np.ndarray, rows: Joined, tokeniser: Tokeniser) -> list[tuple[int, str]]:
    """The first of the bad rows of a whole set, each with why it cannot be used.

    Raises:
        InputError: bad rows are an error, or they are more than a twentieth of all: then it is not the rows, but how
            they are read.
    """
    if tokeniser.options.bad_rows == "error":
        raise refusal(bad.tolist(), len(rows), rows, tokeniser)
    listed = [(at, reason(rows, at, tokeniser)) for at in bad[:LISTED].tolist()]
    refuse_many(len(bad), len(rows), rows.name, [why for _, why in listed])
    return listed


def refusal(bad: list[int], seen: int, rows: Joined, tokeniser: Tokeniser) -> InputError:
    """The error that names the first of the bad rows, and their number among those seen."""
    first = tokeniser.fault(rows, bad[0])
    more = f" (and {len(bad) - 1:,} more of {seen:,} rows cannot be used)" if len(bad) > 1 else ""
    skip = "To leave such rows out, set data.bad_rows: skip." if len(bad) <= MOST * seen else None
    fix = "\n".join(part for part in (first.fix, skip) if part)
    return InputError(first.what + more, where=first.where, fix=fix or None)


def reason(rows: Joined, index: int, tokeniser: Tokeniser) -> str:
    """Where a bad row is and why it cannot be used, in a line."""
    return str(tokeniser.fault(rows, index)).splitlines()[0]


def refuse_many(bad: int, seen: int, name: str, listed: Sequence[str]) -> None:
    """Raises InputError where bad rows are more than may be skipped."""
    if bad > MOST * seen:
        raise InputError(
            f"{bad:,} of {seen:,} rows cannot be used; more than {MOST:.0%} are not skipped:\n  " + "\n  ".join(listed),
            where=name,
            fix="Mend them, or leave them out of the data.",
        )
