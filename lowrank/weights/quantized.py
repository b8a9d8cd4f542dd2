"""Bases in 4 or 8 bits (bitsandbytes): the dense weights that they stand for, a block of rows at a time.

An adapter trained over a quantised base belongs to the weights that the quantised ones stand for. Either the folder
holds those (a quantised checkpoint), or it holds the original ones and loading quantised them; then the merge quantises
each weight as loading did, and takes what it stands for.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from lowrank.errors import InputError
from lowrank.weights.adapterfile import shorten
from lowrank.weights.basemodel import BaseModel
from lowrank.weights.tensorfile import TensorFile, parse_json_object

_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_STATE = ".quant_state.bitsandbytes__"
_BLOCK = 64  # bitsandbytes' default, which transformers does not change


class Decoder(Protocol):
    """The dense weight behind a quantised one, in the shape that the model's parameter has."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns)."""
        ...

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (not included), float32."""
        ...


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a quantised model's files are read.

    Attributes:
        decoders: Tensor name in the files -> the dense weight behind it.
        dropped: Names that only the quantised form needs.
    """

    decoders: dict[str, Decoder]
    dropped: frozenset[str]


@dataclass(frozen=True, slots=True)
class FourBits:
    """nf4 or fp4: two values in a byte, the first in the upper half; each is code[nibble] · absmax of its block.

    Attributes:
        packed: Gives the bytes `first` to `last` of the packed values.
        absmax: (blocks,), float32.
        code: (16,), what the nibbles stand for.
    """

    shape: tuple[int, int]
    packed: Callable[[int, int], Tensor]
    absmax: Tensor
    code: Tensor
    blocksize: int

    def rows(self, first: int, last: int) -> Tensor:
        """See `Decoder.rows`."""
        begin, end = first * self.shape[1], last * self.shape[1]
        data = self.packed(begin // 2, (end + 1) // 2)
        nibbles = torch.stack([data >> 4, data & 15], dim=1).flatten()[begin % 2 : begin % 2 + end - begin]
        block = begin // self.blocksize
        scale = self.absmax[block : -(-end // self.blocksize)].repeat_interleave(self.blocksize)
        offset = begin - block * self.blocksize
        return (self.code[nibbles.int()] * scale[offset : offset + end - begin]).view(last - first, self.shape[1])


@dataclass(frozen=True, slots=True)
class EightBits:
    """LLM.int8(): each row is int8 values · the row's largest magnitude / 127."""

    shape: tuple[int, int]
    values: Callable[[int, int], Tensor]
    largest: Tensor

    def rows(self, first: int, last: int) -> Tensor:
        """See `Decoder.rows`."""
        return self.values(first, last).float() * (self.largest[first:last, None].float() / 127.0)


class _OnTheFly:
    """A weight that loading quantises; what it stands for is worked out when its first rows are asked for."""

    def __init__(self, file: TensorFile, name: str, config: BitsAndBytesConfig, transposed: bool, last: _Last) -> None:
        self.file, self.name, self.config, self.transposed, self.last = file, name, config, transposed, last
        rows, columns = file.entries[name].shape
        self.shape = (rows, columns)

    def rows(self, first: int, last: int) -> Tensor:
        decoder = self.last.get(self.name, self._quantise)
        if not self.transposed:
            return decoder.rows(first, last)
        return decoder.rows(0, decoder.shape[0]).t()[first:last]

    def _quantise(self) -> Decoder:
        from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

        weight = self.file.read(self.name)
        weight = weight.t().contiguous() if self.transposed else weight
        shape = (weight.shape[0], weight.shape[1])
        if self.config.load_in_8bit:
            values, largest, _ = int8_vectorwise_quant(weight.half())
            return EightBits(shape, lambda first, last: values[first:last], largest)
        packed, state = quantize_4bit(
            weight,
            blocksize=_BLOCK,
            compress_statistics=self.config.bnb_4bit_use_double_quant,
            quant_type=self.config.bnb_4bit_quant_type,
        )
        absmax, code = state.absmax, state.code
        assert code is not None
        if state.state2 is not None and state.offset is not None:
            absmax = _nested(absmax, state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
        return FourBits(shape, lambda first, last: packed.flatten()[first:last], absmax, code, _BLOCK)


class _Last:
    """The weight that was quantised last: threads work on rows of the same one, and only one is held."""

    def __init__(self) -> None:
        self.lock, self.name = threading.Lock(), ""
        self.decoder: Decoder | None = None

    def get(self, name: str, make: Callable[[], Decoder]) -> Decoder:
        with self.lock:
            if self.name != name or self.decoder is None:
                self.decoder = None
                self.name, self.decoder = name, make()
            return self.decoder


def decode_stored(base: BaseModel) -> Decoding | None:
    """How to read a folder that holds a quantised model; None for a dense one.

    Raises:
        InputError: It is quantised in another way than bitsandbytes', or its tensors do not go together.
    """
    config = getattr(base.config, "quantization_config", None)
    if config is None:
        return None
    fields = config if isinstance(config, dict) else config.to_dict()
    method = fields.get("quant_method")
    if method != "bitsandbytes":
        raise InputError(
            f"The base is quantised with {method}; adapters are merged into dense bases and bitsandbytes' ones.",
            where=str(base.folder),
            fix="Give the dense model that it was made from as the base.",
        )
    decoders: dict[str, Decoder] = {}
    dropped: set[str] = set()
    for file in base.files.values():
        for name in file.entries:
            kinds = {_STATE: _stored_four_bits, ".SCB": _stored_eight_bits}
            for mark, read in kinds.items():
                weight = name.partition(mark)[0].removesuffix(".weight") + ".weight"
                if mark in name and weight in file.entries:
                    decoders[weight] = read(base, file, weight, name)
        dropped |= {name for name in file.entries if name.endswith((*_PARTS, ".SCB", ".weight_format"))}
        dropped |= {name for name in file.entries if _STATE in name}
    return Decoding(decoders, frozenset(dropped))


def decode_as_loaded(base: BaseModel, quantization: Mapping[str, Any]) -> Decoding:
    """How a dense folder reads after loading it with a `quantization_config`.

    Args:
        base: The dense base.
        quantization: The fields of transformers' BitsAndBytesConfig.

    Raises:
        InputError: bitsandbytes is missing, or no linear layer would be quantised.
    """
    if find_spec("bitsandbytes") is None:
        raise InputError(
            "The adapter was trained over a quantised base, and quantising it again needs bitsandbytes.",
            fix="pip install 'lowrank[quantization]'",
        )
    config = BitsAndBytesConfig.from_dict(dict(quantization))
    assert isinstance(config, BitsAndBytesConfig)
    names = _quantised_modules(base, config)
    last = _Last()
    decoders: dict[str, Decoder] = {}
    for file in base.files.values():
        for entry in file.entries.values():
            pieces = base.pieces[entry.name]
            if len(pieces) == 1 and pieces[0].whole and pieces[0].parameter.removesuffix(".weight") in names:
                module = base.skeleton.get_submodule(pieces[0].parameter.removesuffix(".weight"))
                if pieces[0].parameter.endswith(".weight"):
                    decoders[entry.name] = _OnTheFly(file, entry.name, config, isinstance(module, Conv1D), last)
    if len(decoders) < len(names):
        found = {base.pieces[name][0].parameter.removesuffix(".weight") for name in decoders}
        raise InputError(
            f"Weights that loading would quantise are not stored one by one: {shorten(sorted(names - found))}.",
            where=str(base.folder),
        )
    return Decoding(decoders, frozenset())


def _quantised_modules(base: BaseModel, config: BitsAndBytesConfig) -> set[str]:
    """The modules that transformers would make quantised ones of, found by letting it."""
    model = copy.deepcopy(base.skeleton)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    return {name for name, module in model.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")}


def _stored_four_bits(base: BaseModel, file: TensorFile, weight: str, state_name: str) -> Decoder:
    state = parse_json_object(bytes(file.read(state_name).tolist()), file.path)
    shape, blocksize = state.get("shape"), state.get("blocksize")
    expected = _expected_shape(base, file, weight)
    count = expected[0] * expected[1]
    good = isinstance(blocksize, int) and blocksize > 0 and isinstance(shape, list) and tuple(shape) == expected
    if not good or file.entries[weight].size != (count + 1) // 2:
        raise _inconsistent(file, weight)
    assert isinstance(blocksize, int)
    try:
        absmax = file.read(f"{weight}.absmax")
        if "nested_offset" in state:
            inner = [file.read(f"{weight}.{part}") for part in ("nested_absmax", "nested_quant_map")]
            absmax = _nested(absmax, inner[0], inner[1], float(str(state["nested_offset"])), _size(state))
        code = file.read(f"{weight}.quant_map").float()
    except (KeyError, IndexError, ValueError) as error:
        raise _inconsistent(file, weight) from error
    if absmax.numel() != -(-count // blocksize) or code.shape != (16,):
        raise _inconsistent(file, weight)
    return FourBits(expected, lambda first, last: file.read_bytes(weight, first, last), absmax.float(), code, blocksize)


def _stored_eight_bits(base: BaseModel, file: TensorFile, weight: str, scale_name: str) -> Decoder:
    expected = _expected_shape(base, file, weight)
    largest = file.read(scale_name)
    entry = file.entries[weight]
    if entry.shape != expected or entry.dtype != "I8" or largest.shape != expected[:1]:
        raise _inconsistent(file, weight)
    return EightBits(expected, lambda first, last: file.read_rows(weight, first, last), largest)


def _expected_shape(base: BaseModel, file: TensorFile, weight: str) -> tuple[int, int]:
    pieces = base.pieces[weight]
    parameters = base.skeleton.state_dict()
    if len(pieces) != 1 or not pieces[0].whole or parameters[pieces[0].parameter].dim() != 2:
        raise _inconsistent(file, weight)
    rows, columns = parameters[pieces[0].parameter].shape
    return rows, columns


def _nested(absmax: Tensor, inner: Tensor, code: Tensor, offset: float | Tensor, blocksize: int) -> Tensor:
    """Block maxima that were quantised to 8 bits themselves ("double quantisation")."""
    scale = inner.float().repeat_interleave(blocksize)[: absmax.numel()]
    return code.float()[absmax.flatten().int()] * scale + offset


def _size(state: Mapping[str, object]) -> int:
    size = state.get("nested_blocksize")
    if not isinstance(size, int) or size <= 0:
        raise ValueError("nested_blocksize")
    return size


def _inconsistent(file: TensorFile, weight: str) -> InputError:
    return InputError(f"The parts of the quantised tensor {weight} do not go together.", where=str(file.path))
