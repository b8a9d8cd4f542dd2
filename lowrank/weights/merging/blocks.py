"""One block of rows of a merged tensor: read, changed, rounded, written, and its rounding measured."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank.errors import InputError
from lowrank.storage.tensorfile import TORCH_DTYPES, Entry, read_bytes, write_bytes
from lowrank.weights.merging.buffers import BUFFERS
from lowrank.weights.merging.merge_choices import Rounding
from lowrank.weights.merging.merge_plan import Planned
from lowrank.weights.merging.proof import Trial
from lowrank.weights.merging.rounding import RoundingLoss, round_into
from lowrank.weights.merging.updates import Update

# Values: their float32 sum fits a core's cache, and what Python does for a block costs little beside it.
BLOCK = 1 << 18
MEASURED = 16  # one block of so many is measured: measuring costs as much as merging, and a block says enough


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `first` to `last` of one tensor.

    Attributes:
        to: Where the tensor goes in the new file.
        stands_for: How many blocks' rounding this one's is taken for; 0 where it is not measured.
        sampled: Its rounding is tried, and it is read back from the file.
    """

    planned: Planned
    to: Entry
    first: int
    last: int
    stands_for: float
    sampled: bool

    @property
    def size(self) -> int:
        """Bytes in the new file."""
        return self.to.size * (self.last - self.first) // max(1, _row_count(self.planned.rows))


def blocks_of(planned: Planned, to: Entry) -> Iterator[Block]:
    """A tensor's blocks in order; one for the whole tensor where an update needs that."""
    rows = _row_count(planned.rows)
    step = rows_at_once(planned) if all(update.splits for _, update in planned.changes) else max(1, rows)
    measured = sum(min(step, rows - first) for first in range(0, rows, step * MEASURED))
    low_rank = any(update.low_rank for _, update in planned.changes)
    for number, first in enumerate(range(0, rows, step)):
        stands_for = rows / measured if low_rank and number % MEASURED == 0 else 0.0
        sampled = number % MEASURED == 0 or first + step >= rows or not planned.changes
        yield Block(planned, to, first, min(first + step, rows), stands_for, sampled)


def rows_at_once(planned: Planned) -> int:
    """How many of a tensor's rows make up a block."""
    return max(1, BLOCK // max(1, torch.Size(planned.shape).numel() // max(1, _row_count(planned.rows))))


def merge_block(
    block: Block, files: Mapping[Path, int], out: Path, rounding: Rounding, trial: Trial | None = None
) -> RoundingLoss | None:
    """Writes the block, tried where there is a trial; returns what rounding lost where that is measured.

    A block that is a whole large tensor is read and written in parts: only its float32 sum is held whole.

    Raises:
        InputError: The base holds NaN or infinity there, or the result does not fit the dtype.
        JobError: The trial failed.
    """
    planned = block.planned
    shape = (block.last - block.first, *planned.rows[1:])
    exact = BUFFERS.take("exact", torch.Size(shape).numel(), _sum_dtype(planned)).view(shape)
    parts = _parts(block)
    raw = torch.empty(0)
    for first, last in parts:
        raw = _read_rows(planned, first, last, files)
        exact[first - block.first : last - block.first].copy_(raw)
    if trial is not None and block.stands_for:
        trial.source(planned, raw, parts[-1][0])
    products = None
    for piece, update in planned.changes:
        at, height = piece.at * planned.height, planned.height
        first, last = max(block.first, at), min(block.last, at + piece.rows * height)
        if first < last:
            rows = exact[first - block.first : last - block.first]
            found = _apply(piece.parameter, update, rows, piece.first * height + first - at, trial)
            products = found if len(rows) == len(exact) and len(parts) == 1 else None
    loss = RoundingLoss()
    for first, last in parts:
        values = exact[first - block.first : last - block.first]
        _check_range(values, planned, products)
        written = BUFFERS.take("written", values.numel(), TORCH_DTYPES[planned.dtype]).view(values.shape)
        round_into(written, values, rounding, seed=zlib.crc32(planned.name.encode()) + first)
        if trial is not None and block.sampled:
            scratch = BUFFERS.take("difference", values.numel(), values.dtype).view(values.shape)
            trial.rounded(planned, values, written, first, products, scratch)
        if block.stands_for:
            before = raw if len(parts) == 1 else _read_rows(planned, first, last, files)
            loss.add(_measure(before, values, written, block.stands_for))
        write_bytes(files[out], block.to.start + first * (block.to.size // _row_count(planned.rows)), written)
    return loss if block.stands_for else None


def _apply(parameter: str, update: Update, rows: torch.Tensor, first: int, trial: Trial | None) -> torch.Tensor | None:
    products = None
    for step in update.steps:
        judge = None if trial is None else trial.before(parameter, step, rows, first)
        step.apply(rows, first)
        products = None if judge is None else judge(rows)
    return products


def _parts(block: Block) -> list[tuple[int, int]]:
    step = rows_at_once(block.planned)
    return [(first, min(first + step, block.last)) for first in range(block.first, block.last, step)]


def copy_bytes(source: int, start: int, out: int, to: int, size: int) -> None:
    """Bytes from one open file to another, through the thread's buffer."""
    write_bytes(out, to, read_bytes(source, start, BUFFERS.take("raw", size, torch.uint8)))


def _row_count(shape: tuple[int, ...]) -> int:
    """The first dimension; 1 for a number."""
    return shape[0] if shape else 1


def _check_range(exact: torch.Tensor, planned: Planned, products: torch.Tensor | None) -> None:
    largest = torch.finfo(TORCH_DTYPES[planned.dtype]).max
    # a sum passes on what is not finite, and each product with signs is one
    fits = math.isfinite((exact if products is None else products).sum().item())
    if fits and largest < torch.finfo(torch.bfloat16).max:
        fits = exact.abs().max().item() <= largest
    if not fits:
        raise InputError(
            f"{planned.name} gets values that {planned.dtype} cannot hold, or has NaN or infinity in the base",
            fix="Choose bfloat16 or float32 (--dtype, dtype=) if the base is sound.",
        )


def _measure(raw: torch.Tensor, exact: torch.Tensor, written: torch.Tensor, stands_for: float) -> RoundingLoss:
    difference = BUFFERS.take("difference", raw.numel(), exact.dtype).view(raw.shape)
    error = torch.linalg.vector_norm(difference.copy_(written).sub_(exact)).item()
    effect = torch.linalg.vector_norm(difference.copy_(raw).sub_(exact)).item()
    return RoundingLoss(stands_for * effect**2, stands_for * error**2)


def _read_rows(planned: Planned, first: int, last: int, files: Mapping[Path, int]) -> torch.Tensor:
    """The base's rows in its dtype; zeros where the base has none (a new head, new tokens)."""
    entry, rows = planned.source, last - first
    shape = (rows, *planned.rows[1:])
    if planned.decoder is not None:
        return planned.decoder.rows(first, last)
    if entry is None:
        return torch.zeros(shape)
    stored = _row_count(entry.shape) * planned.height
    there = max(0, min(last, stored) - first)
    row = entry.size // max(1, stored)
    buffer = BUFFERS.take("raw", there * row, torch.uint8)
    data = read_bytes(files[planned.path], entry.start + first * row, buffer)
    values = data.view(entry.torch_dtype).view(there, *shape[1:])
    return values if there == rows else torch.cat([values, values.new_zeros(rows - there, *shape[1:])])


def _sum_dtype(planned: Planned) -> torch.dtype:
    double = planned.dtype == "F64" or (planned.source is not None and planned.source.dtype == "F64")
    return torch.float64 if double else torch.float32
