"""Weights in 4 or 8 bits (bitsandbytes): the dense ones that they stand for, a block of rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import BitsAndBytesConfig

from lowrank.storage.tensorfile import TensorFile

_BLOCK = 64  # bitsandbytes' default, which transformers does not change
_NESTED_BLOCK = 256  # of double quantisation, bitsandbytes' own
_AT_ONCE = 1 << 19  # values that are worked out together
_QUANTISED_AT_ONCE = 1 << 16  # values, of which bitsandbytes takes 64 bytes and more each on a CPU


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
class FourBits:
    """nf4 or fp4: two values in a byte, the first in the upper half; each is code[nibble] · absmax of its block.

    Attributes:
        packed: Gives the bytes `first` to `last` of the packed values.
        absmax: Gives the largest magnitudes of the blocks `first` to `last`, float32: all of a large model's would
            take gigabytes.
        code: (16,), what the nibbles stand for.
    """

    shape: tuple[int, int]
    packed: Callable[[int, int], torch.Tensor]
    absmax: Callable[[int, int], torch.Tensor]
    code: torch.Tensor
    blocksize: int

    def rows(self, first: int, last: int) -> torch.Tensor:
        begin, end = first * self.shape[1], last * self.shape[1]
        data = self.packed(begin // 2, (end + 1) // 2)
        nibbles = torch.stack([data >> 4, data & 15], dim=1).flatten()[begin % 2 : begin % 2 + end - begin]
        block = begin // self.blocksize
        scale = self.absmax(block, -(-end // self.blocksize)).repeat_interleave(self.blocksize)
        offset = begin - block * self.blocksize
        return (self.code[nibbles.int()] * scale[offset : offset + end - begin]).view(last - first, self.shape[1])


@dataclass(frozen=True, slots=True)
class EightBits:
    """LLM.int8(): each row is int8 values · the row's largest magnitude / 127."""

    shape: tuple[int, int]
    values: Callable[[int, int], torch.Tensor]
    largest: torch.Tensor

    def rows(self, first: int, last: int) -> torch.Tensor:
        return self.values(first, last).float() * (self.largest[first:last, None].float() / 127.0)


@dataclass(frozen=True, slots=True)
class Dense:
    """A weight that has been worked out, float32."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def rows(self, first: int, last: int) -> torch.Tensor:
        return self.values[first:last]


class OnTheFly:
    """A weight that loading quantises; what it stands for is worked out when its first rows are asked for."""

    def __init__(self, file: TensorFile, name: str, config: BitsAndBytesConfig, transposed: bool, last: Last) -> None:
        self.file, self.name, self.config, self.transposed, self.last = file, name, config, transposed, last
        rows, columns = file.entries[name].shape
        self.shape = (rows, columns)

    def rows(self, first: int, last: int) -> torch.Tensor:
        return self.last.get(self.name, self._quantise).rows(first, last)

    def _quantise(self) -> Decoder:
        quantised = self._quantised()
        return _transposed(quantised) if self.transposed else quantised

    def _quantised(self) -> Decoder:
        from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit, quantize_blockwise

        weight = self.file.read(self.name)
        weight = weight.t().contiguous() if self.transposed else weight
        shape = (weight.shape[0], weight.shape[1])
        if self.config.load_in_8bit:
            values, largest, _ = int8_vectorwise_quant(weight.half())
            return EightBits(shape, lambda first, last: values[first:last], largest)
        # In parts of whole blocks, for the sake of memory.
        kind = self.config.bnb_4bit_quant_type
        parts = [
            quantize_4bit(part, blocksize=_BLOCK, quant_type=kind)
            for part in weight.flatten().split(_QUANTISED_AT_ONCE)
        ]
        flat, code = torch.cat([packed.flatten() for packed, _ in parts]), parts[0][1].code
        absmax = torch.cat([state.absmax for _, state in parts])
        assert code is not None
        if self.config.bnb_4bit_use_double_quant:
            offset = absmax.mean()
            quantised, state = quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK)
            assert state.code is not None
            absmax = nested_maxima(quantised, state.absmax, state.code, offset, _NESTED_BLOCK)
        return FourBits(
            shape, lambda first, last: flat[first:last], lambda first, last: absmax[first:last], code, _BLOCK
        )


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


def nested_maxima(
    absmax: torch.Tensor,
    inner: torch.Tensor,
    code: torch.Tensor,
    offset: float | torch.Tensor,
    blocksize: int,
    skip: int = 0,
) -> torch.Tensor:
    """Block maxima that were quantised to 8 bits themselves ("double quantisation").

    Args:
        absmax: (blocks,), uint8.
        inner: The largest magnitudes of every `blocksize` maxima.
        code: (256,), what the bytes stand for.
        offset: The mean that was taken out before.
        blocksize: How many maxima have one of `inner`.
        skip: How many of the first of `inner`'s group are not in `absmax`.
    """
    scale = inner.float().repeat_interleave(blocksize)[skip : skip + absmax.numel()]
    return code.float()[absmax.flatten().int()] * scale + offset
