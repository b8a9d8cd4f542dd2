"""A progress bar for what takes over two seconds; plain lines where the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PATIENCE = 2.0
LINE_EVERY = 15.0


@contextmanager
def progress(what: str, total: int) -> Generator[Callable[[int], None]]:
    """Show how far a piece of work is, on standard error.

    Args:
        what: What is being done, such as "tokenising".
        total: How many steps it has.

    Yields:
        A function to call with the number of steps that have been done since the last call.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=total)
    started = last_line = time.monotonic()
    done = 0

    def advance(steps: int) -> None:
        nonlocal done, last_line
        done += steps
        bar.update(task, completed=done)
        now = time.monotonic()
        if now - started < PATIENCE or done >= total:
            return
        if console.is_terminal:
            bar.start()
        elif now - last_line >= LINE_EVERY:
            last_line = now
            console.print(f"{what}: {done:,} of {total:,}", highlight=False)

    try:
        yield advance
    finally:
        bar.stop()
