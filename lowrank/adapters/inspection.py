"""What is on a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.inplace import check_in_place
from lowrank.adapters.install import hosts
from lowrank.adapters.kinds.kind import HostModule
from lowrank.adapters.methods.layer import LowRankLayer
from lowrank.adapters.record import find_record, record_of
from lowrank.adapters.registry import method_of


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter on a model.

    Attributes:
        name: Its name.
        config: As it was given.
        active: Whether it acts now.
        scale: What its trained scale is multiplied with now.
        matched: How many modules each pattern of `target_modules` matched.
        left_out: Linear layers that "all-linear" leaves out because an adapter would not act there, and why.
        modules: The paths of the modules that carry it.
        parameters: How many values it holds.
        trainable: How many of them require gradients.
    """

    name: str
    config: AdapterConfig
    active: bool
    scale: float
    matched: dict[str, int]
    left_out: dict[str, str]
    modules: tuple[str, ...]
    parameters: int
    trainable: int


def describe(model: nn.Module) -> dict[str, AdapterInfo]:
    """The adapters on a model by name; empty for a model without."""
    record = find_record(model)
    if record is None:
        return {}
    return {name: _info(model, name) for name in record.configs}


def _info(model: nn.Module, name: str) -> AdapterInfo:
    record = record_of(model)
    layers = {path: adapters[name] for path, _, adapters in hosts(model) if name in adapters}
    parameters = {id(p): p for layer in layers.values() for p in layer.parameters()}.values()  # tied layers share
    return AdapterInfo(
        name=name,
        config=record.configs[name],
        active=name in record.activity.now.names,
        scale=record.strengths[name].now,
        matched=record.matched[name],
        left_out=record.left_out[name],
        modules=tuple(layers),
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
    )


def config_of(model: nn.Module, adapter: str) -> AdapterConfig:
    """An adapter's config."""
    record = record_of(model)
    record.check_known((adapter,))
    return record.configs[adapter]


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names of peft's file, without its prefix "base_model.model.".

    They share storage with the live parameters: writing into them with `copy_` loads.
    """
    record_of(model).check_known((adapter,))
    check_in_place(model, (adapter,))
    named = {
        f"{path}.{name}": tensor.detach()
        for path, module, adapters in hosts(model)
        if adapter in adapters
        for name, tensor in adapters.layers()[adapter].in_file(module).items()
    }
    config = config_of(model, adapter)
    shared = next((layer.shared for _, layer in layers_of(model, adapter).values()), None)
    if shared is None or not method_of(config).saves_shared(config):
        return named
    return named | shared.tensors()


def layers_of(model: nn.Module, adapter: str) -> dict[str, tuple[HostModule, LowRankLayer]]:
    """The modules with factors of an adapter, by path, each with its layer."""
    held = {path: (module, adapters.layers().get(adapter)) for path, module, adapters in hosts(model)}
    return {path: (module, layer) for path, (module, layer) in held.items() if isinstance(layer, LowRankLayer)}
