"""How a quantised base's files are read for a merge.

An adapter trained over a quantised base belongs to the weights that the quantised ones stand for. Either the folder
holds those (a quantised checkpoint), or it holds the original ones and loading quantised them; then the merge quantises
each weight as loading did, and takes what it stands for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank.errors import InputError
from lowrank.quantisers.decoder import Decoder, Last, OnTheFly
from lowrank.quantisers.registry import QUANTISERS, loading_config, quantiser_named
from lowrank.weights.files.adapter_file import QUANTISED_FROM, shorten
from lowrank.weights.files.model_folder import ModelFolder

Onto = Literal["dequantised", "original"]


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
        InputError: No quantiser of this program has made it, or its tensors do not go together.
    """
    fields = base.quantization
    if fields is None:
        return None
    method = fields.get("quant_method")
    quantiser = quantiser_named(method)
    if quantiser is None:
        raise InputError(
            f"the base is quantised with {method or 'what its config does not name'}; adapters are merged into dense "
            f"bases and those of {' and '.join(QUANTISERS)}",
            where=str(base.folder),
            fix="Give the dense model that it was made from as the base (--base).",
        )
    parameters = base.skeleton.state_dict()

    def shape(name: str) -> tuple[int, int] | None:
        pieces = base.pieces[name]
        if len(pieces) != 1 or not pieces[0].whole or parameters[pieces[0].parameter].dim() != 2:
            return None
        rows, columns = parameters[pieces[0].parameter].shape
        return rows, columns

    decoders: dict[str, Decoder] = {}
    dropped: set[str] = set()
    for file in base.files.values():
        found = quantiser.stored(file, shape)
        decoders |= found.decoders
        dropped |= found.dropped
    return Decoding(decoders, frozenset(dropped))


def _decode_as_loaded(base: ModelFolder, quantization: Mapping[str, Any]) -> Decoding:
    """How a dense folder reads after loading it with a `quantization_config`.

    Args:
        base: The dense base.
        quantization: A quantiser's options, or all that the loaded model's config noted, and `QUANTISED_FROM`.

    Raises:
        InputError: The quantiser is missing, or a weight that it would quantise is not stored as one.
    """
    config = loading_config(quantization)
    quantiser = quantiser_named(config.quant_method)
    assert quantiser is not None
    names = _quantised_modules(base, config)
    dtype = getattr(torch, str(quantization.get(QUANTISED_FROM)), None)
    last = Last()
    decoders: dict[str, Decoder] = {}
    for file in base.files.values():
        for entry in file.entries.values():
            pieces = base.pieces[entry.name]
            if len(pieces) == 1 and pieces[0].whole and pieces[0].parameter.removesuffix(".weight") in names:
                module = base.skeleton.get_submodule(pieces[0].parameter.removesuffix(".weight"))
                if pieces[0].parameter.endswith(".weight"):
                    quantise, transposed = partial(quantiser.quantise, config=config), isinstance(module, Conv1D)
                    decoders[entry.name] = OnTheFly(
                        file, entry.name, quantise, last, transposed=transposed, dtype=dtype
                    )
    if len(decoders) < len(names):
        found = {base.pieces[name][0].parameter.removesuffix(".weight") for name in decoders}
        raise InputError(
            f"weights that loading would quantise are not stored one by one: {shorten(sorted(names - found))}",
            where=str(base.folder),
        )
    return Decoding(decoders, frozenset())


def _quantised_modules(base: ModelFolder, config: QuantizationConfigMixin) -> set[str]:
    """The modules whose weights transformers would quantise, found by letting it prepare the architecture."""
    model = copy.deepcopy(base.skeleton)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    modules = [name for name, module in model.named_modules() if "weight" in module._parameters]
    return {name for name in modules if quantizer.param_needs_quantization(model, f"{name}.weight")}
