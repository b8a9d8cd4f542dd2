"""Writing a planned shard: every byte read once and written once, a block of rows at a time, on a few threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from lowrank.storage.tensorfile import Entry, encode_header, write_bytes
from lowrank.weights.merging.blocks import MEASURED, Block, blocks_of, copy_bytes, merge_block, rows_at_once
from lowrank.weights.merging.merge_choices import Rounding
from lowrank.weights.merging.merge_plan import Planned
from lowrank.weights.merging.proof import Trial
from lowrank.weights.merging.rounding import RoundingLoss

COPY = 1 << 22  # bytes
AT_A_TIME = 32  # pieces of work that a thread takes
_THREADS = 8  # each has buffers of its own; more do not make a disk faster

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Copy:
    """Bytes that stay as they are."""

    path: Path
    start: int
    to: int
    size: int


def write_shard(
    path: Path,
    tensors: list[Planned],
    metadata: Mapping[str, str],
    rounding: Rounding,
    advance: Callable[[int], None],
    trial: Trial | None = None,
) -> dict[str, RoundingLoss]:
    """Writes one file.

    Args:
        path: The new file.
        tensors: What it holds, in this order.
        metadata: Its metadata table.
        rounding: How computed values become the tensors' dtypes.
        advance: Called with the number of bytes after each piece of work.
        trial: Tries what is written; None does not.

    Returns:
        What rounding lost, for each tensor with a low-rank update.

    Raises:
        InputError: The base holds values that are not finite, or the result does not fit the dtype.
        JobError: The trial failed.
        OSError: The disk is full or cannot be written.
    """
    header, places = encode_header(((t.name, t.dtype, t.shape) for t in tensors), metadata)
    losses: dict[str, RoundingLoss] = {}
    with _opened(path, tensors) as files, one_thread_each():
        write_bytes(files[path], 0, torch.frombuffer(bytearray(header), dtype=torch.uint8))
        threads = min(_THREADS, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            pieces = _some_at_a_time(_work(tensors, places))
            for done in pool.map(lambda some: [_do(work, files, path, rounding, trial) for work in some], pieces):
                for work, loss in done:
                    if loss is not None and isinstance(work, Block):
                        losses.setdefault(work.planned.name, RoundingLoss()).add(loss)
                advance(sum(work.size for work, _ in done))
        finally:
            pool.shutdown(cancel_futures=True)
        if trial is not None:
            trial.file(path, MEASURED, rows_at_once, tensors)
    return losses


def _some_at_a_time(work: Iterator[_Copy | Block]) -> Iterator[list[_Copy | Block]]:
    """Handing each piece to a thread by itself would cost a tenth of the time."""
    while some := list(islice(work, AT_A_TIME)):
        yield some


def _do(
    work: _Copy | Block, files: Mapping[Path, int], out: Path, rounding: Rounding, trial: Trial | None
) -> tuple[_Copy | Block, RoundingLoss | None]:
    if isinstance(work, Block):
        return work, merge_block(work, files, out, rounding, trial)
    copy_bytes(files[work.path], work.start, files[out], work.to, work.size)
    return work, None


def _work(tensors: list[Planned], places: Mapping[str, Entry]) -> Iterator[_Copy | Block]:
    """The pieces of work in the order of the file; copies of neighbours are one copy."""
    pending: _Copy | None = None
    for planned in tensors:
        to = places[planned.name]
        if planned.copied:
            assert planned.source is not None
            pending, done = _joined(pending, _Copy(planned.path, planned.source.start, to.start, to.size))
            yield from _cut(done)
        else:
            yield from _cut(pending)
            pending = None
            yield from blocks_of(planned, to)
    yield from _cut(pending)


def _joined(before: _Copy | None, after: _Copy) -> tuple[_Copy, _Copy | None]:
    if (
        before
        and before.path == after.path
        and before.start + before.size == after.start
        and before.to + before.size == after.to
    ):
        return _Copy(before.path, before.start, before.to, before.size + after.size), None
    return after, before


def _cut(copy: _Copy | None) -> Iterator[_Copy]:
    for at in range(0, copy.size if copy else 0, COPY):
        assert copy is not None
        yield _Copy(copy.path, copy.start + at, copy.to + at, min(COPY, copy.size - at))


@contextmanager
def _opened(out: Path, tensors: list[Planned]) -> Generator[dict[Path, int]]:
    files: dict[Path, int] = {}
    try:
        files[out] = os.open(out, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        for path in {tensor.path for tensor in tensors}:
            files[path] = os.open(path, os.O_RDONLY)
        yield files
    finally:
        for fd in files.values():
            os.close(fd)


@contextmanager
def one_thread_each() -> Generator[None]:
    """Torch's own threads off while a pool works; blocks are too small for both."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
