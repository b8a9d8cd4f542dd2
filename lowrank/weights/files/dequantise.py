"""How a quantised base's files are read for a merge (bitsandbytes' 4 and 8 bits).

An adapter trained over a quantised base belongs to the weights that the quantised ones stand for. Either the folder
holds those (a quantised checkpoint), or it holds the original ones and loading quantised them; then the merge quantises
each weight as loading did, and takes what it stands for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from lowrank.errors import InputError
from lowrank.storage.tensorfile import TensorFile, parse_json_object
from lowrank.weights.files.adapter_file import shorten
from lowrank.weights.files.model_folder import ModelFolder
from lowrank.weights.files.quantized import Decoder, EightBits, FourBits, Last, OnTheFly, nested_maxima

Onto = Literal["dequantised", "original"]

_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a model's files are read: nothing special for a dense one.

    Attributes:
        decoders: torch.Tensor name in the files -> the dense weight behind it.
        dropped: Names that only the quantised form needs.
        notes: What is to be said about it.
    """

    decoders: dict[str, Decoder] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)


def choose_decoding(base: ModelFolder, onto: str, trained_over: Mapping[str, Any] | None) -> Decoding:
    """How the base's weights are read, and what is to be said about that.

    Args:
        base: The base.
        onto: "dequantised" or "original".
        trained_over: How the base was quantised in training, empty where it was not, None where that is not known.

    Raises:
        InputError: `onto` is something else, or does not go with the base.
    """
    if onto not in ("dequantised", "original"):
        raise InputError(
            f"onto={onto!r} (--onto) is neither dequantised nor original; merged weights are not quantised again, as "
            "the steps are larger than most of the adapter's changes",
            fix="Merge into 16 bits, and keep the adapter apart where 4 bits must be.",
        )
    stored = decode_stored(base)
    if stored is not None and onto == "original":
        raise InputError(
            "the base's folder holds quantised weights; the original ones are not in it",
            where=str(base.folder),
            fix="Give the original model as the base (--base).",
        )
    if stored is not None:
        return stored
    if trained_over is None:
        note = (
            "The adapter's file does not say whether its base was quantised in training, and it is merged as if it was "
            "not; if it was, say how (--trained-over, quantization=)."
        )
        return Decoding(notes=[note])
    if not trained_over:
        return Decoding()
    if onto == "dequantised":
        return _decode_as_loaded(base, trained_over)
    note = (
        "The adapter was trained over quantised weights and is merged onto the original ones: what it learned to make "
        "up for is not there, and the answers differ from those that were evaluated."
    )
    return Decoding(notes=[note])


def decode_stored(base: ModelFolder) -> Decoding | None:
    """How to read a folder that holds a quantised model; None for a dense one.

    Raises:
        InputError: It is quantised in another way than bitsandbytes', or its tensors do not go together.
    """
    fields = base.quantization
    if fields is None:
        return None
    method = fields.get("quant_method")
    if method != "bitsandbytes":
        raise InputError(
            f"the base is quantised with {method or 'what its config does not name'}; adapters are merged into dense "
            "bases and bitsandbytes' ones",
            where=str(base.folder),
            fix="Give the dense model that it was made from as the base (--base).",
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


def _decode_as_loaded(base: ModelFolder, quantization: Mapping[str, Any]) -> Decoding:
    """How a dense folder reads after loading it with a `quantization_config`.

    Args:
        base: The dense base.
        quantization: The fields of transformers' BitsAndBytesConfig.

    Raises:
        InputError: bitsandbytes is missing, or no linear layer would be quantised.
    """
    if find_spec("bitsandbytes") is None:
        raise InputError(
            "the adapter was trained over a quantised base, and quantising it again needs bitsandbytes",
            fix="Install it: `pip install 'lowrank[quantization]'`.",
        )
    config = BitsAndBytesConfig.from_dict(dict(quantization))
    assert isinstance(config, BitsAndBytesConfig)
    names = _quantised_modules(base, config)
    last = Last()
    decoders: dict[str, Decoder] = {}
    for file in base.files.values():
        for entry in file.entries.values():
            pieces = base.pieces[entry.name]
            if len(pieces) == 1 and pieces[0].whole and pieces[0].parameter.removesuffix(".weight") in names:
                module = base.skeleton.get_submodule(pieces[0].parameter.removesuffix(".weight"))
                if pieces[0].parameter.endswith(".weight"):
                    decoders[entry.name] = OnTheFly(file, entry.name, config, isinstance(module, Conv1D), last)
    if len(decoders) < len(names):
        found = {base.pieces[name][0].parameter.removesuffix(".weight") for name in decoders}
        raise InputError(
            f"weights that loading would quantise are not stored one by one: {shorten(sorted(names - found))}",
            where=str(base.folder),
        )
    return Decoding(decoders, frozenset())


def _quantised_modules(base: ModelFolder, config: BitsAndBytesConfig) -> set[str]:
    """The modules that transformers would make quantised ones of, found by letting it."""
    model = copy.deepcopy(base.skeleton)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    return {name for name, module in model.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")}


def _stored_four_bits(base: ModelFolder, file: TensorFile, weight: str, state_name: str) -> Decoder:
    state = parse_json_object(bytes(file.read(state_name).tolist()), file.path)
    shape, blocksize = state.get("shape"), state.get("blocksize")
    expected = _expected_shape(base, file, weight)
    count = expected[0] * expected[1]
    good = isinstance(blocksize, int) and blocksize > 0 and isinstance(shape, list) and tuple(shape) == expected
    if not good or file.entries[weight].size != (count + 1) // 2:
        raise _inconsistent(file, weight)
    assert isinstance(blocksize, int)
    try:
        maxima = _maxima(file, weight, state, -(-count // blocksize))
        code = file.read(f"{weight}.quant_map").float()
    except (KeyError, IndexError, ValueError) as error:
        raise _inconsistent(file, weight) from error
    if code.shape != (16,):
        raise _inconsistent(file, weight)
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
        return nested_maxima(file.read_rows(name, first, last), groups, code, offset, size, skip=first % size)

    return maxima


def _stored_eight_bits(base: ModelFolder, file: TensorFile, weight: str, scale_name: str) -> Decoder:
    expected = _expected_shape(base, file, weight)
    largest = file.read(scale_name)
    entry = file.entries[weight]
    if entry.shape != expected or entry.dtype != "I8" or largest.shape != expected[:1]:
        raise _inconsistent(file, weight)
    return EightBits(expected, lambda first, last: file.read_rows(weight, first, last), largest)


def _expected_shape(base: ModelFolder, file: TensorFile, weight: str) -> tuple[int, int]:
    pieces = base.pieces[weight]
    parameters = base.skeleton.state_dict()
    if len(pieces) != 1 or not pieces[0].whole or parameters[pieces[0].parameter].dim() != 2:
        raise _inconsistent(file, weight)
    rows, columns = parameters[pieces[0].parameter].shape
    return rows, columns


def _size(state: Mapping[str, object]) -> int:
    size = state.get("nested_blocksize")
    if not isinstance(size, int) or size <= 0:
        raise ValueError("nested_blocksize")
    return size


def _inconsistent(file: TensorFile, weight: str) -> InputError:
    return InputError(f"the parts of the quantised tensor {weight} do not go together", where=str(file.path))
