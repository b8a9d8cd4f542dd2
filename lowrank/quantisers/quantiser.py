"""What this program needs to know of a library that holds a base's weights in few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank.ops.lora_linear import Unpack
from lowrank.quantisers.decoder import Decoder
from lowrank.storage.tensorfile import TensorFile

HeldModule: TypeAlias = Any
"""An `nn.Module` whose weight a quantiser holds. `nn.Module` types its attributes as anything at all."""


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The quantised weights of a file.

    Attributes:
        decoders: The tensor's name in the file -> the dense weight behind it.
        dropped: Names of tensors that only the quantised form needs.
    """

    decoders: dict[str, Decoder] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)


class Quantiser(Protocol):
    """One library; stateless. Nothing here imports it until a model is loaded, read or quantised with it."""

    name: str
    """The library's, and transformers' word for it in a model's config (`quant_method`)."""

    offer: str
    """Its name with what a config sets to ask for it, for messages."""

    schemes: Mapping[str, Mapping[str, Any]]
    """The ways in which it quantises, by a short name, and the options that each stands for."""

    def config(self, options: Mapping[str, Any]) -> QuantizationConfigMixin:
        """What transformers loads a base with.

        Args:
            options: Of a config's section, or all that a loaded model's `quantization_config` notes.

        Raises:
            InputError: The library is not installed, or does not quantise so.
        """
        ...

    def settle(self, model: nn.Module) -> None:
        """Sets what keeps the weights of a model that was just loaded as they are, whatever passes follow."""
        ...

    def holds(self, module: HeldModule) -> bool:
        """Whether it is a linear layer whose weight is held by this quantiser."""
        ...

    def bits(self, module: HeldModule) -> int:
        """How many bits a value of its weight has."""
        ...

    def weight(self, module: HeldModule) -> torch.Tensor:
        """The matrix W (out, in) that the layer stands for, dense."""
        ...

    def product(self, module: HeldModule) -> tuple[torch.Tensor, Unpack] | None:
        """The stored weight and what unpacks it; None where the layer's own forward does more than x·Wᵀ."""
        ...

    def widen(self, module: HeldModule) -> None:
        """Has the layer compute with its weight unpacked in float32, from whatever dtype it was quantised."""
        ...

    def parametrises(self, step: nn.Module) -> bool:
        """Whether this parametrisation of torch's stands for a parameter that the quantiser holds."""
        ...

    def shard(self, module: HeldModule) -> None:
        """Prepares a layer for shards, which are plain tensors.

        Raises:
            InputError: Its weights cannot be sharded.
        """
        ...

    def named(self, file: TensorFile) -> TensorFile:
        """A quantised model's file with each quantised weight under its parameter's name.

        Raises:
            InputError: The file is quantised in a way that is not read.
        """
        ...

    def stored(self, file: TensorFile, shape: Callable[[str], tuple[int, int] | None]) -> StoredWeights:
        """The quantised weights of a file that `named` has given.

        Args:
            file: One of a quantised model's.
            shape: (out, in) of the matrix of that name in the model; None where it is none.

        Raises:
            InputError: A weight's parts do not go together.
        """
        ...

    def quantise(self, weight: torch.Tensor, config: QuantizationConfigMixin) -> Decoder:
        """The weight (out, in) as it is after loading with `config`: what it then stands for."""
        ...
