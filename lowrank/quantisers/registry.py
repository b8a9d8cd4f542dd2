"""The quantisers: one line each. Their names are there without torch; they themselves are loaded when one is needed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowrank.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from lowrank.quantisers.quantiser import Quantiser

QUANTISERS = {
    "bitsandbytes": "BitsAndBytes",
    "torchao": "TorchAo",
}
"""A file of this room, named as the library is (`quant_method`), and the class in it."""

_CHATTY = ("torchao", "torch.utils._pytree")  # kernels for other machines; enums that torchao registers

DEFAULT = next(iter(QUANTISERS))


_loaded: list[Quantiser] = []


def quantisers() -> Sequence[Quantiser]:
    """All of them."""
    if not _loaded:  # by hand: torch.compile looks through functools.cache, and cannot follow an import
        pairs = QUANTISERS.items()
        _loaded[:] = [getattr(import_module(f"lowrank.quantisers.{file}"), name)() for file, name in pairs]
    return _loaded


def quantiser_named(method: object) -> Quantiser | None:
    """The quantiser that a model's config names (`quant_method`); None where it is another library."""
    return next((quantiser for quantiser in quantisers() if quantiser.name == method), None)


def quantiser_of(module: nn.Module) -> Quantiser | None:
    """The quantiser that holds a linear layer's weight; None for every other module."""
    for quantiser in quantisers():
        if quantiser.holds(module):
            return quantiser
    return None


def parametrises(step: nn.Module) -> bool:
    """Whether this parametrisation of torch's stands for a parameter that a quantiser holds."""
    return any(quantiser.parametrises(step) for quantiser in quantisers())


def settle(model: nn.Module) -> None:
    """Sets what keeps the quantised weights of a model that was just loaded as they are."""
    for quantiser in quantisers():
        quantiser.settle(model)


def loading_config(options: Mapping[str, Any]) -> QuantizationConfigMixin:
    """What transformers loads a base with.

    Args:
        options: Of a config's section, or what a loaded model's `quantization_config` notes. `quant_method` names the
            quantiser; left out, it is the first.

    Raises:
        InputError: There is no such quantiser, it is not installed, or does not quantise so.
    """
    method = options.get("quant_method", DEFAULT)
    quantiser = quantiser_named(method)
    if quantiser is None:
        raise InputError(
            f"there is no quantiser {method!r}",
            where="quantization.quant_method",
            fix=f"Take one of {', '.join(QUANTISERS)}.",
        )
    return quantiser.config(options)


def schemes() -> dict[str, Mapping[str, Any]]:
    """The ways to quantise, by a short name, and the options that each stands for."""
    found = {
        name: {"quant_method": quantiser.name, **options}
        for quantiser in quantisers()
        for name, options in quantiser.schemes.items()
    }
    return {**found, "none": {}}


def parameter_count(model: nn.Module) -> int:
    """How many values a model's parameters stand for: 4-bit weights lie several in an element."""
    modules: list[Any] = [module for module in model.modules() if quantiser_of(module) is not None]
    held = {id(module.weight): module.in_features * module.out_features for module in modules}
    return sum(held.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def quieten() -> None:
    """Has libraries keep to themselves what they lack, when transformers imports them: few runs use one."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def offers() -> str:
    """The quantisers, each with what a config sets to ask for it."""
    return " or ".join(quantiser.offer for quantiser in quantisers())
