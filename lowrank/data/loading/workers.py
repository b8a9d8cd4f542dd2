"""Rows to tokens on every core: chunks of rows go to processes, tables come back in the order of the rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from lowrank.data.examples.token_table import TokenTable
from lowrank.data.reading.sources import Joined
from lowrank.data.supervision.tokenise import Tokeniser
from lowrank.errors import JobError

CHUNK_ROWS = 500
# Below this many rows, starting processes costs more than it saves.
WORTH_PROCESSES = 4000

_job: tuple[Joined, Tokeniser] | None = None


def tables(rows: Joined, tokeniser: Tokeniser, workers: int | None = None) -> Iterator[TokenTable]:
    """The tokens of all rows, chunk by chunk in order.

    Args:
        rows: The rows.
        tokeniser: What turns them into tokens.
        workers: Processes; None: one for each core this process may use, if there are rows enough. Only Linux can share
            rows and tokenizer with processes that are forked; elsewhere the work is done in this one.

    Raises:
        InputError: the first row in order that cannot be used.
        JobError: a process was killed.
    """
    ranges = [(begin, min(begin + CHUNK_ROWS, len(rows))) for begin in range(0, len(rows), CHUNK_ROWS)]
    workers = workers if workers is not None else (_cores() if len(rows) >= WORTH_PROCESSES else 1)
    if workers == 1 or sys.platform != "linux":
        yield from (tokeniser.table(rows, begin, end) for begin, end in ranges)
        return
    rows.formats(0, 1)  # opened once here, not in every process
    with ProcessPoolExecutor(workers, get_context("fork"), _adopt, (rows, tokeniser)) as pool:
        try:
            yield from pool.map(_table, ranges)
        except BrokenProcessPool:
            raise JobError(
                "a process that tokenises rows was ended from outside, mostly for want of memory",
                fix="Free some memory and start again: nothing has been trained yet.",
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def _adopt(rows: Joined, tokeniser: Tokeniser) -> None:
    """Runs in each new process, which has got its arguments by forking, not by pickling."""
    global _job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _job = (rows, tokeniser)


def _table(part: tuple[int, int]) -> TokenTable:
    assert _job is not None
    rows, tokeniser = _job
    return tokeniser.table(rows, *part)
