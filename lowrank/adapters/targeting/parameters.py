"""Which parameters of a model `target_parameters` names, and how a module holds them: plain, or quantised.

A quantiser holds a parameter that is no linear layer's by a parametrisation: reading the attribute dequantises it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.kinds.kind import HostModule
from lowrank.adapters.kinds.known import kind_of
from lowrank.adapters.modules import base_modules
from lowrank.adapters.targeting.matching import matches_end
from lowrank.adapters.targeting.targets import fused_experts, is_kept
from lowrank.errors import InputError
from lowrank.quantisers.registry import offers, parametrises

_DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def find_parameters(model: nn.Module, config: AdapterConfig) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The parameters to adapt.

    A parameter of a linear layer, an embedding or a convolution goes too: it is adapted as what it is, whatever its
    module does with it.

    Returns:
        For each module that holds some, its path and their names in the module's order; and how many parameters each
        pattern matched. Both are empty without `target_parameters`.

    Raises:
        InputError: a pattern matches nothing, a parameter that no adapter fits, or a field that does not go with
            `target_parameters`.
    """
    wanted: list[str] = getattr(config, "target_parameters", None) or []
    if not wanted:
        return {}, {}
    _check_fields(config)
    found: dict[str, list[str]] = {}
    counts = dict.fromkeys(wanted, 0)
    modules = base_modules(model)
    for path, module in modules.items():
        for name in parameter_names(module):
            matching = [pattern for pattern in counts if matches_end(f"{path}.{name}", pattern)]
            for pattern in matching:
                counts[pattern] += 1
            if matching:
                found.setdefault(path, []).append(name)
    if missing := [pattern for pattern, count in counts.items() if not count]:
        raise InputError("; ".join(_nothing(pattern, modules) for pattern in missing))
    for path, names in found.items():
        _check_module(path, modules[path], names, config)
    return found, counts


def parameter_names(module: HostModule) -> list[str]:
    """The module's own parameters, in the order in which files count them; those that are parametrised come last."""
    return [name for name, value in module._parameters.items() if value is not None] + parametrised_names(module)


def parametrised_names(module: HostModule) -> list[str]:
    """Those that are worked out from others whenever they are read (`torch.nn.utils.parametrize`)."""
    return list(module.parametrizations) if parametrize.is_parametrized(module) else []


def quantised_names(module: HostModule) -> list[str]:
    """Those that a quantiser holds."""
    steps = {name: module.parametrizations[name] for name in parametrised_names(module)}
    return [name for name, first in steps.items() if parametrises(first[0])]


@torch.no_grad()
def make_parameters_dense(module: HostModule, dtype: torch.dtype | None = None) -> None:
    """Puts plain parameters, of `dtype` or their own, in the place of parametrised ones (4 bits, weight norm).

    Not by torch's `remove_parametrizations`, which changes a class that deep copies of the module share.
    """
    weights = {name: getattr(module, name).to(dtype) for name in module.parametrizations}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))


def _nothing(pattern: str, modules: Mapping[str, nn.Module]) -> str:
    fused = fused_experts(modules)
    hint = f"this model's experts are {', '.join(fused)}" if fused else "this model has no fused experts"
    return f"target_parameters: {pattern!r} matches no parameter; {hint}"


def _check_fields(config: AdapterConfig) -> None:
    """Fields that mean nothing sound for a parameter, or that no reader of the file would take with it (peft)."""
    refused = {
        "use_dora": getattr(config, "use_dora", False),
        "method_name": config.method_name != "lora",
        "lora_dropout": getattr(config, "lora_dropout", 0) > 0,
        "fan_in_fan_out": config.fan_in_fan_out,
        "init_lora_weights": getattr(config, "init_lora_weights", None) not in (True, False, "gaussian"),
    }
    for field, is_set in refused.items():
        if is_set:
            raise InputError(
                f"{field}: {getattr(config, field)} does not go with target_parameters",
                fix=f"Leave {field} out, or put target_parameters into an adapter of their own.",
            )


def _check_module(path: str, module: nn.Module, names: list[str], config: AdapterConfig) -> None:
    if not is_kept(path, config):
        raise InputError(
            f"target_parameters matches {path}.{names[0]}, and exclude_modules, modules_to_save or layers_to_transform "
            "leave that module out",
            fix="These fields do not narrow target_parameters; name single layers there (layers.3.mlp.experts. ...).",
        )
    if kind_of(module) is None and config.bias != "none" and any("bias" in name for name in parameter_names(module)):
        raise InputError(
            f"bias: {config.bias} would train the biases of {path}, and target_parameters has no place for them",
            fix="Leave bias out, or train the biases in an adapter of their own.",
        )
    quantised = quantised_names(module)
    if 0 < len(set(names) & set(quantised)) < len(names):
        raise InputError(f"{path} keeps only some of {', '.join(names)} quantised; their order in a file is not known")
    for name in names:
        weight = getattr(module, name)
        if weight.ndim not in (2, 3) or weight.dtype not in _DENSE:
            raise InputError(
                f"{path}.{name} is {tuple(weight.shape)} of {weight.dtype}, and no adapter fits that",
                fix=f"An adapter fits (experts, ., .) or (out, in) in 16 bits or more, or quantised {offers()}.",
            )
