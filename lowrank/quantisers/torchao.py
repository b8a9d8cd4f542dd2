"""torchao's weights in 8 bits: whole numbers, and a scale for each row or group of a row (`Int8WeightOnlyConfig`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank.errors import InputError
from lowrank.ops.lora_linear import Unpack
from lowrank.quantisers.decoder import Decoder, inconsistent
from lowrank.quantisers.quantiser import HeldModule, StoredWeights
from lowrank.storage.tensorfile import TensorFile

_VALUES, _SCALE, _ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
_PARTS = (_VALUES, _SCALE, _ZERO)
_WAY = "torchao's Int8WeightOnlyConfig"


class TorchAo:
    """`torch.nn.Linear` with an `Int8Tensor` for its weight."""

    name = "torchao"
    offer = "by torchao (quant_method: torchao, bits: 8)"
    schemes: Mapping[str, Mapping[str, Any]] = {"torchao-int8": {"bits": 8}}

    def config(self, options: Mapping[str, Any]) -> TorchAoConfig:
        """From `bits`, or from what torchao notes itself (`quant_type`)."""
        if find_spec("torchao") is None:
            raise InputError(
                "a quantised base needs torchao here, which is not installed",
                fix="Install it: `pip install 'lowrank[torchao]'`.",
            )
        from torchao.quantization import Int8WeightOnlyConfig

        if "quant_type" in options:
            config = TorchAoConfig.from_dict(dict(options))
            if not isinstance(config.quant_type, Int8WeightOnlyConfig):
                raise InputError(f"{type(config.quant_type).__name__} quantises otherwise than {_WAY}")
            return config
        if options.get("bits") != 8:
            raise InputError(
                f"torchao holds weights in 8 bits here, and bits is {options.get('bits')}",
                where="quantization.bits",
                fix="Set it to 8; for 4 bits take bitsandbytes: load_in_4bit: true alone.",
            )
        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))  # a process's settings stay its own

    def settle(self, model: nn.Module) -> None:
        """Nothing changes them."""

    def holds(self, module: HeldModule) -> bool:
        """By the weight's class. Weights with something for the inputs, too, are another thing."""
        weight: Any = module._parameters.get("weight")
        if not isinstance(module, nn.Linear) or type(weight).__name__ != "Int8Tensor":
            return False
        return weight.act_quant_kwargs is None and weight.act_pre_scale is None

    def bits(self, module: HeldModule) -> int:
        """8."""
        return 8

    def weight(self, module: HeldModule) -> torch.Tensor:
        """In the dtype that it was quantised from."""
        return module.weight.dequantize()

    def product(self, module: HeldModule) -> tuple[torch.Tensor, Unpack] | None:
        """Unpacked for each product, as bitsandbytes' 4 bits are."""
        return module.weight, _unpacked

    def widen(self, module: HeldModule) -> None:
        """It is unpacked in its input's dtype."""

    def parametrises(self, step: nn.Module) -> bool:
        """torchao replaces parameters themselves."""
        return False

    def shard(self, module: HeldModule) -> None:
        """Refused: each shard would need its part of the scales."""
        raise InputError(
            "torchao's weights are not sharded",
            where="training.fsdp",
            fix="Take bitsandbytes' (quantization.load_in_4bit: true), a dense base, or leave training.fsdp out.",
        )

    def named(self, file: TensorFile) -> TensorFile:
        """`x._weight_qdata` as `x.weight`, without torchao's notes on it, which are checked here."""
        notes = {name: _note(text) for name, text in file.metadata.items()}
        strange = [name for name, note in notes.items() if note.get("_type", "Tensor") not in ("Tensor", "Int8Tensor")]
        strange += [name for name, note in notes.items() if note.get("_data", {}).get("act_quant_kwargs") is not None]
        strange += [name for name in file.entries if _part(name).startswith("_weight_") and _part(name) not in _PARTS]
        if strange:
            raise InputError(f"{strange[0]} is quantised otherwise than {_WAY}", where=str(file.path))
        entries = {_named(name): replace(entry, name=_named(name)) for name, entry in file.entries.items()}
        if len(entries) < len(file.entries):
            raise InputError("a weight is in the file twice, quantised and dense", where=str(file.path))
        metadata = {name: text for name, text in file.metadata.items() if name != "tensor_names" and not notes[name]}
        return TensorFile(file.path, entries, metadata)

    def stored(self, file: TensorFile, shape: Callable[[str], tuple[int, int] | None]) -> StoredWeights:
        """Values and scales row by row; a zero point where the file has one."""
        weights = {_beside(name, "weight") for name in file.entries if _part(name) == _SCALE}
        weights |= {name for name, entry in file.entries.items() if _part(name) == "weight" and entry.dtype == "I8"}
        decoders = {name: _stored(file, name, shape) for name in sorted(weights)}
        return StoredWeights(decoders, {name for name in file.entries if _part(name) in (_SCALE, _ZERO)})

    def quantise(self, weight: torch.Tensor, config: QuantizationConfigMixin) -> Decoder:
        """As `torchao.quantization.quantize_` does: scales come out otherwise for other dtypes of the weight."""
        from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig

        assert isinstance(config, TorchAoConfig)
        assert isinstance(config.quant_type, Int8WeightOnlyConfig)
        granularity = config.quant_type.granularity
        assert granularity is not None  # torchao has checked it
        held = Int8Tensor.from_hp(weight, granularity=granularity)
        return Int8Rows((weight.shape[0], weight.shape[1]), _rows_of(held.qdata), _rows_of(held.scale), _zeros(held))


def _zeros(held: Any) -> Rows | None:
    return None if held.zero_point is None else _rows_of(held.zero_point)


def _unpacked(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    held: Any = weight
    return held.dequantize(dtype)


Rows: TypeAlias = Callable[[int, int], torch.Tensor]
"""Gives rows `first` to `last` of a tensor; its only one where there is one for all."""


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """(values - zero) · scale, with one zero and scale for each group of a row.

    Attributes:
        values: (rows, columns), int8.
        scale: (rows or 1, groups).
        zero: Likewise; None for none.
    """

    shape: tuple[int, int]
    values: Rows
    scale: Rows
    zero: Rows | None

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (not included), float32."""
        scale = self.scale(first, last).float()[..., None]
        values = self.values(first, last).float().view(last - first, scale.shape[1], -1)
        if self.zero is not None:
            values = values - self.zero(first, last)[..., None]
        return (values * scale).view(last - first, self.shape[1])


def _rows_of(tensor: torch.Tensor) -> Rows:
    return lambda first, last: tensor if len(tensor) == 1 else tensor[first:last]


def _stored(file: TensorFile, weight: str, shape: Callable[[str], tuple[int, int] | None]) -> Decoder:
    scale_name, zero_name = _beside(weight, _SCALE), _beside(weight, _ZERO)
    held, scale, zero = (file.entries.get(name) for name in (weight, scale_name, zero_name))
    expected = None if held is None else shape(weight)
    if held is None or scale is None or expected is None or (held.shape, held.dtype) != (expected, "I8"):
        raise inconsistent(file, weight)
    rows, columns = expected
    fits = len(scale.shape) == 2 and scale.shape[0] in (1, rows) and columns % max(1, scale.shape[1]) == 0
    if not fits or scale.dtype not in ("F32", "BF16", "F16") or (zero is not None and zero.shape != scale.shape):
        raise inconsistent(file, weight)
    zeros = None if zero is None else _rows_in(file, zero_name)
    return Int8Rows(expected, _rows_in(file, weight), _rows_in(file, scale_name), zeros)


def _rows_in(file: TensorFile, name: str) -> Rows:
    alone = file.entries[name].shape[0] == 1
    return lambda first, last: file.read_rows(name, 0, 1) if alone else file.read_rows(name, first, last)


def _named(name: str) -> str:
    return _beside(name, "weight") if _part(name) == _VALUES else name


def _part(name: str) -> str:
    return name.rpartition(".")[2]


def _beside(name: str, part: str) -> str:
    return f"{name.rpartition('.')[0]}.{part}"


def _note(text: str) -> dict[str, Any]:
    """What torchao writes of a tensor; nothing for any other text."""
    try:
        note = json.loads(text)
    except ValueError:
        return {}
    known = isinstance(note, dict) and "_type" in note and isinstance(note.get("_data", {}), dict)
    return note if known else {}
