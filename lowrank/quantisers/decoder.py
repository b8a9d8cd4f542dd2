"""The dense weight behind a quantised one, a block of rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from lowrank.errors import InputError
from lowrank.storage.tensorfile import TensorFile

_AT_ONCE = 1 << 19  # values that are worked out together


class Decoder(Protocol):
    """The dense weight behind a quantised one, in the shape that the model's parameter has."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns)."""
        ...

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (not included), float32."""
        ...


@dataclass(frozen=True, slots=True)
class Dense:
    """A weight that has been worked out, float32."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns)."""
        return tuple(self.values.shape)

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (not included)."""
        return self.values[first:last]


class OnTheFly:
    """A weight that loading quantises; what it stands for is worked out when its first rows are asked for."""

    def __init__(
        self,
        file: TensorFile,
        name: str,
        quantise: Callable[[torch.Tensor], Decoder],
        last: Last,
        *,
        transposed: bool,
        dtype: torch.dtype | None,
    ) -> None:
        """`quantise` takes the weight (out, in), in `dtype` or the file's own; `transposed`: the file has (in, out)."""
        self.file, self.name, self.quantise, self.last = file, name, quantise, last
        self.transposed, self.dtype = transposed, dtype
        rows, columns = file.entries[name].shape
        self.shape = (rows, columns)

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (not included), float32."""
        return self.last.get(self.name, self._quantised).rows(first, last)

    def _quantised(self) -> Decoder:
        weight = self.file.read(self.name)
        weight = weight if self.dtype is None else weight.to(self.dtype)
        return _transposed(self.quantise(weight.t().contiguous())) if self.transposed else self.quantise(weight)


def _transposed(decoder: Decoder) -> Dense:
    """Worked out once: a block of the transposed weight's rows has a part of every row of the other."""
    rows, columns = decoder.shape
    values = torch.empty(columns, rows)
    step = max(1, _AT_ONCE // columns)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        values[:, first:last] = decoder.rows(first, last).t()
    return Dense(values)


class Last:
    """The weight that was quantised last: threads work on rows of the same one, and only one is held."""

    def __init__(self) -> None:
        self.lock, self.name = threading.Lock(), ""
        self.decoder: Decoder | None = None

    def get(self, name: str, make: Callable[[], Decoder]) -> Decoder:
        """The weight of that name, made now if it is not the last one."""
        with self.lock:
            if self.name != name or self.decoder is None:
                self.decoder = None
                self.name, self.decoder = name, make()
            return self.decoder


def inconsistent(file: TensorFile, weight: str) -> InputError:
    """What a damaged file is told by."""
    return InputError(f"the parts of the quantised tensor {weight} do not go together", where=str(file.path))
