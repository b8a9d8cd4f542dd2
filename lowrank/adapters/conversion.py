"""An adapter in the form that others can use: ordinary factors against the untouched base."""

from __future__ import annotations

import math

import torch
from torch import nn

from lowrank.adapters.config import AdaLoraConfig, AdapterConfig, LoraConfig
from lowrank.adapters.inspection import adapter_tensors, config_of
from lowrank.adapters.install import hosts
from lowrank.adapters.methods.adalora import AdaLoraLayer
from lowrank.adapters.methods.lora import LoraLayer
from lowrank.adapters.record import record_of
from lowrank.errors import InputError


def portable(model: nn.Module, adapter: str) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """The config and tensors to save: what any reader of peft's format makes the same model of.

    PiSSA and OLoRA become an ordinary LoRA of twice the rank, s·(B·A - B₀·A₀), since the base that they are added to is
    the untouched one. AdaLoRA's pruned ranks are cut off, and its `rank_pattern` says which were kept. What `set_scale`
    says is multiplied into `lora_alpha`.

    Raises:
        InputError: the adapter is scaled to 0 or below, which no file can say.
    """
    config, tensors = _as_strong(model, adapter), adapter_tensors(model, adapter)
    if isinstance(config, AdaLoraConfig):
        return _without_pruned(model, adapter, config, tensors)
    if isinstance(config, LoraConfig) and config.init_lora_weights is not True:
        return _with_start(model, adapter, config, tensors)
    return config, tensors


def _as_strong(model: nn.Module, adapter: str) -> AdapterConfig:
    config, factor = config_of(model, adapter), record_of(model).strengths[adapter].now
    if factor == 1.0:
        return config
    if factor <= 0:
        raise InputError(
            f"the adapter {adapter!r} is scaled by {factor:g}, and a file says scales above 0",
            fix="Set its scale to 1 before it is saved.",
        )
    update: dict[str, object] = {"lora_alpha": config.lora_alpha * factor}
    if isinstance(config, LoraConfig):
        update["alpha_pattern"] = {pattern: alpha * factor for pattern, alpha in config.alpha_pattern.items()}
    return config.model_copy(update=update)


def _with_start(
    model: nn.Module, adapter: str, config: LoraConfig, tensors: dict[str, torch.Tensor]
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    started = False
    for path, module, adapters in hosts(model):
        layer = adapters.layers().get(adapter)
        if isinstance(layer, LoraLayer) and layer.start_A is not None and adapters.kind is not None:
            started = True
            term = layer.term(module, adapters.kind)
            for name, factor in (("lora_A", term.A), ("lora_B", term.B)):
                suffix, shaped = adapters.kind.in_file(module, name, factor.detach())
                tensors[f"{path}.{suffix}"] = shaped
    if not started:
        return config.model_copy(update={"init_lora_weights": True, "eva_config": None, "loftq_config": None}), tensors
    grown = math.sqrt(2) if config.use_rslora else 2.0  # keeps s = alpha / r, or alpha / √r
    doubled = config.model_copy(
        update={
            "init_lora_weights": True,
            "r": 2 * config.r,
            "lora_alpha": grown * config.lora_alpha,
            "rank_pattern": {pattern: 2 * r for pattern, r in config.rank_pattern.items()},
            "alpha_pattern": {pattern: grown * alpha for pattern, alpha in config.alpha_pattern.items()},
        }
    )
    return doubled, tensors


def _without_pruned(
    model: nn.Module, adapter: str, config: AdaLoraConfig, tensors: dict[str, torch.Tensor]
) -> tuple[AdaLoraConfig, dict[str, torch.Tensor]]:
    if config.total_step is None:  # peft refuses that; any number that leaves room for a budget says as little
        config = config.model_copy(update={"total_step": config.tinit + config.tfinal + 1})
    kept: dict[str, list[bool]] = {}
    for path, _, adapters in hosts(model):
        layer = adapters.layers().get(adapter)
        if not isinstance(layer, AdaLoraLayer):
            continue
        kept[f"{path}.lora_E"] = layer.kept.tolist()
        for name in ("lora_A", "lora_E"):
            tensors[f"{path}.{name}"] = tensors[f"{path}.{name}"][layer.kept]
        tensors[f"{path}.lora_B"] = tensors[f"{path}.lora_B"][:, layer.kept]
    if config.rank_pattern is None and all(all(ranks) for ranks in kept.values()):
        return config, tensors
    return config.model_copy(update={"rank_pattern": _in_full(config, kept)}), tensors


def _in_full(config: AdaLoraConfig, kept: dict[str, list[bool]]) -> dict[str, list[bool]]:
    """What is kept now, told of the ranks that the adapter began with: an earlier run may have cut some off."""
    pattern = {}
    for name, now in kept.items():
        ranks = iter(now)
        before = (config.rank_pattern or {}).get(name, [True] * len(now))
        pattern[name] = [was_kept and next(ranks) for was_kept in before]
    return pattern


def as_lora(model: nn.Module, adapter: str) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """An AdaLoRA adapter as an ordinary LoRA with a rank pattern: A ← Λ·Q and B ← P, what is pruned cut off.

    A module that kept no rank gets one of zeros: in a LoRA a rank is at least 1.
    """
    config, tensors = portable(model, adapter)
    assert isinstance(config, AdaLoraConfig)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, _, adapters in hosts(model):
        layer = adapters.layers().get(adapter)
        if not isinstance(layer, AdaLoraLayer):
            continue
        A, E, B = (tensors.pop(f"{path}.{name}") for name in ("lora_A", "lora_E", "lora_B"))
        if A.shape[0] == 0:
            A, E, B = A.new_zeros(1, A.shape[1]), A.new_ones(1, 1), B.new_zeros(B.shape[0], 1)
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = A * E, B
        ranks[path], alphas[path] = A.shape[0], layer.scale * A.shape[0]
    shared = set(LoraConfig.model_fields) & set(AdaLoraConfig.model_fields) - {"rank_pattern", "init_lora_weights"}
    fields = {name: getattr(config, name) for name in shared}
    fields |= {"r": max(ranks.values()), "rank_pattern": ranks, "alpha_pattern": alphas}
    return LoraConfig.model_validate(fields), tensors
