"""bitsandbytes: nf4 and fp4 (QLoRA, Dettmers 2023), and LLM.int8() (Dettmers 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank.errors import InputError
from lowrank.ops.lora_linear import Unpack
from lowrank.quantisers.decoder import Decoder, inconsistent
from lowrank.quantisers.quantiser import HeldModule, StoredWeights
from lowrank.storage.tensorfile import TensorFile, parse_json_object

_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
_STATE = ".quant_state.bitsandbytes__"
_BLOCK = 64  # the default, which transformers does not change
_NESTED_BLOCK = 256  # of double quantisation
_AT_ONCE = 1 << 16  # values that are quantised together: they take 64 bytes and more each on a CPU


class BitsAndBytes:
    """Linear layers as `Linear4bit` and `Linear8bitLt`; other parameters in 4 bits by a parametrisation of torch's."""

    name = "bitsandbytes"
    offer = "by bitsandbytes (load_in_4bit, load_in_8bit)"
    schemes: Mapping[str, Mapping[str, Any]] = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "int8": {"load_in_8bit": True},
    }

    def config(self, options: Mapping[str, Any]) -> BitsAndBytesConfig:
        """From its own fields."""
        if find_spec("bitsandbytes") is None:
            raise InputError(
                "a quantised base needs bitsandbytes, which is not installed",
                fix="Install it: `pip install 'lowrank[quantization]'`.",
            )
        config = BitsAndBytesConfig.from_dict(dict(options))
        assert isinstance(config, BitsAndBytesConfig)
        return config

    def settle(self, model: nn.Module) -> None:
        """Products are in the inputs' dtype; adapted layers have them so, whatever the library is told.

        On CPUs with AVX512-BF16 the first pass without gradients would repack 4-bit weights, and spoil the rest.
        """
        modules: list[HeldModule] = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
        for module in modules:
            module.compute_dtype, module.compute_type_is_set = None, False
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False

    def holds(self, module: HeldModule) -> bool:
        """By the class."""
        return type(module).__name__ in ("Linear4bit", "Linear8bitLt")

    def bits(self, module: HeldModule) -> int:
        """4 or 8."""
        return 4 if type(module).__name__ == "Linear4bit" else 8

    def weight(self, module: HeldModule) -> torch.Tensor:
        """Of 4 bits in the dtype that they were quantised from, of 8 bits in float32."""
        if self.bits(module) == 4:
            return _unpacked(_four_bits(module))
        # The first call moves the weight into `state`.
        stored = module.weight if module.state.CB is None else module.state.CB
        scale = module.weight.SCB if module.state.SCB is None else module.state.SCB
        return stored.data.float() * (scale.float() / 127.0)[:, None]

    def product(self, module: HeldModule) -> tuple[torch.Tensor, Unpack] | None:
        """LLM.int8() rounds the inputs, too."""
        return (_four_bits(module), _unpacked) if self.bits(module) == 4 else None

    def widen(self, module: HeldModule) -> None:
        """4-bit weights are unpacked in their state's dtype; of 8-bit ones only the inputs have one."""
        if self.bits(module) == 4:
            module.weight.quant_state.dtype = torch.float32

    def parametrises(self, step: nn.Module) -> bool:
        """By the class (`bitsandbytes.nn.parametrize`)."""
        return type(step).__name__.startswith("Bnb4bit")

    def shard(self, module: HeldModule) -> None:
        """The state of 4-bit weights hangs on the parameter, which the shards replace: the module keeps it."""
        state = getattr(module.weight, "quant_state", None)
        if state is not None:
            module.quant_state = state

    def named(self, file: TensorFile) -> TensorFile:
        """As it is."""
        return file

    def stored(self, file: TensorFile, shape: Callable[[str], tuple[int, int] | None]) -> StoredWeights:
        """Each weight with its state beside it: JSON in bytes for 4 bits, the rows' scales for 8."""
        kinds = {_STATE: _stored_four_bits, ".SCB": _stored_eight_bits}
        found = StoredWeights()
        for name in file.entries:
            for mark, read in kinds.items():
                weight = name.partition(mark)[0].removesuffix(".weight") + ".weight"
                if mark in name and weight in file.entries:
                    expected = shape(weight)
                    if expected is None:
                        raise inconsistent(file, weight)
                    found.decoders[weight] = read(file, weight, name, expected)
            if name.endswith(_PARTS) or _STATE in name:
                found.dropped.add(name)
        return found

    def quantise(self, weight: torch.Tensor, config: QuantizationConfigMixin) -> Decoder:
        """As `Linear4bit` and `Linear8bitLt` do when they are moved to a device."""
        assert isinstance(config, BitsAndBytesConfig)
        return _eight_bits(weight) if config.load_in_8bit else _quantised_four_bits(weight, config)


def _four_bits(module: HeldModule) -> torch.Tensor:
    """The module's weight. One that was gathered from its shards has lost its state: its module kept it."""
    weight = module.weight
    state = getattr(module, "quant_state", None)
    if state is not None and getattr(weight, "quant_state", None) is None:
        weight.quant_state = state
    return weight


def _unpacked(weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    held: Any = weight
    dense = dequantize_4bit(held.data, held.quant_state)
    return dense if dtype is None else dense.to(dtype)


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
        """Rows `first` to `last` (not included), float32."""
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
        """Rows `first` to `last` (not included), float32."""
        return self.values(first, last).float() * (self.largest[first:last, None].float() / 127.0)


def _stored_four_bits(file: TensorFile, weight: str, state_name: str, expected: tuple[int, int]) -> Decoder:
    state = parse_json_object(bytes(file.read(state_name).tolist()), file.path)
    shape, blocksize = state.get("shape"), state.get("blocksize")
    count = expected[0] * expected[1]
    good = isinstance(blocksize, int) and blocksize > 0 and isinstance(shape, list) and tuple(shape) == expected
    if not good or file.entries[weight].size != (count + 1) // 2:
        raise inconsistent(file, weight)
    assert isinstance(blocksize, int)
    try:
        maxima = _maxima(file, weight, state, -(-count // blocksize))
        code = file.read(f"{weight}.quant_map").float()
    except (KeyError, IndexError, ValueError) as error:
        raise inconsistent(file, weight) from error
    if code.shape != (16,):
        raise inconsistent(file, weight)
    return FourBits(expected, lambda first, last: file.read_bytes(weight, first, last), maxima, code, blocksize)


def _maxima(
    file: TensorFile, weight: str, state: Mapping[str, object], blocks: int
) -> Callable[[int, int], torch.Tensor]:
    """Gives the largest magnitudes of some of a weight's blocks, read when they are asked for."""
    name, nested = f"{weight}.absmax", "nested_offset" in state
    entry = file.entries[name]
    if entry.shape != (blocks,) or entry.dtype != ("U8" if nested else "F32"):
        raise ValueError(name)
    if not nested:
        return lambda first, last: file.read_rows(name, first, last)
    size, offset = _size(state), float(str(state["nested_offset"]))
    inner, code = file.entries[f"{weight}.nested_absmax"], file.read(f"{weight}.nested_quant_map")
    if inner.shape != (-(-blocks // size),) or code.shape != (256,):
        raise ValueError(inner.name)

    def maxima(first: int, last: int) -> torch.Tensor:
        groups = file.read_rows(inner.name, first // size, -(-last // size))
        return _nested_maxima(file.read_rows(name, first, last), groups, code, offset, size, skip=first % size)

    return maxima


def _size(state: Mapping[str, object]) -> int:
    size = state.get("nested_blocksize")
    if not isinstance(size, int) or size <= 0:
        raise ValueError("nested_blocksize")
    return size


def _stored_eight_bits(file: TensorFile, weight: str, scale_name: str, expected: tuple[int, int]) -> Decoder:
    largest = file.read(scale_name)
    entry = file.entries[weight]
    if entry.shape != expected or entry.dtype != "I8" or largest.shape != expected[:1]:
        raise inconsistent(file, weight)
    return EightBits(expected, lambda first, last: file.read_rows(weight, first, last), largest)


def _eight_bits(weight: torch.Tensor) -> EightBits:
    from bitsandbytes.functional import int8_vectorwise_quant

    values, largest, _ = int8_vectorwise_quant(weight.half())
    return EightBits((weight.shape[0], weight.shape[1]), lambda first, last: values[first:last], largest)


def _quantised_four_bits(weight: torch.Tensor, config: BitsAndBytesConfig) -> FourBits:
    """In parts of whole blocks, for the sake of memory."""
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    kind = config.bnb_4bit_quant_type
    parts = [quantize_4bit(part, blocksize=_BLOCK, quant_type=kind) for part in weight.flatten().split(_AT_ONCE)]
    flat, code = torch.cat([packed.flatten() for packed, _ in parts]), parts[0][1].code
    absmax = torch.cat([state.absmax for _, state in parts])
    assert code is not None
    if config.bnb_4bit_use_double_quant:
        offset = absmax.mean()
        quantised, state = quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK)
        assert state.code is not None
        absmax = _nested_maxima(quantised, state.absmax, state.code, offset, _NESTED_BLOCK)
    shape = (weight.shape[0], weight.shape[1])
    return FourBits(shape, lambda first, last: flat[first:last], lambda first, last: absmax[first:last], code, _BLOCK)


def _nested_maxima(
    absmax: torch.Tensor,
    inner: torch.Tensor,
    code: torch.Tensor,
    offset: float | torch.Tensor,
    size: int,
    skip: int = 0,
) -> torch.Tensor:
    """Block maxima that were quantised to 8 bits themselves ("double quantisation").

    Args:
        absmax: (blocks,), uint8.
        inner: The largest magnitudes of every `size` maxima.
        code: (256,), what the bytes stand for.
        offset: The mean that was taken out before.
        size: How many maxima have one of `inner`.
        skip: How many of the first of `inner`'s group are not in `absmax`.
    """
    scale = inner.float().repeat_interleave(size)[skip : skip + absmax.numel()]
    return code.float()[absmax.flatten().int()] * scale + offset
