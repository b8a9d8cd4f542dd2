"""An adapter in the form that others can use: ordinary factors against the untouched base."""

from __future__ import annotations

import torch
from torch import nn

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.inspection import adapter_tensors, config_of, layers_of
from lowrank.adapters.record import record_of
from lowrank.adapters.registry import method_of
from lowrank.errors import InputError


def portable(model: nn.Module, adapter: str) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """The config and tensors to save: what any reader of peft's format makes the same model of.

    PiSSA and OLoRA become an ordinary LoRA of twice the rank, s·(B·A - B₀·A₀), since the base that they are added to is
    the untouched one. AdaLoRA's pruned ranks are cut off, and its `rank_pattern` says which were kept. What `set_scale`
    says is multiplied into `lora_alpha`.

    Raises:
        InputError: the adapter is scaled to 0 or below, which no file can say.
    """
    config, tensors, factor = config_of(model, adapter), adapter_tensors(model, adapter), _strength(model, adapter)
    method = method_of(config)
    if factor != 1.0:
        config, tensors = method.scaled(config, tensors, factor)
    return method.portable(config, tensors, layers_of(model, adapter))


def as_lora(model: nn.Module, adapter: str) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """An adapter of another method as an ordinary LoRA: AdaLoRA's with a rank pattern, what is pruned cut off; MiSS's.

    Raises:
        InputError: it is one, or its method is more than a low-rank sum.
    """
    method = method_of(config_of(model, adapter))
    made = method.as_lora(*portable(model, adapter), layers_of(model, adapter))
    if made is None:
        raise InputError(f"as_lora is for methods that become a LoRA, and {adapter!r} is of {method.name}")
    return made


def _strength(model: nn.Module, adapter: str) -> float:
    factor = record_of(model).strengths[adapter].now
    if factor <= 0:
        raise InputError(
            f"the adapter {adapter!r} is scaled by {factor:g}, and a file says scales above 0",
            fix="Set its scale to 1 before it is saved.",
        )
    return factor
