"""Optimisers by name, over parameter groups that each have a learning rate and a weight decay."""

from __future__ import annotations

import re

import torch
from torch import nn

from lowrank.adapters.install import AdapterSet
from lowrank.errors import InputError
from lowrank.training.optimisers.muon import Groups
from lowrank.training.optimisers.settings import GroupRule, OptimizerSettings
from lowrank.training.optimisers.table import OPTIMIZERS


def build_optimizer(
    model: nn.Module, settings: OptimizerSettings, name: str = "adamw_torch_fused"
) -> torch.optim.Optimizer:
    """An optimiser over what requires gradients.

    Args:
        model: Adapters in.
        settings: See there.
        name: One of `OPTIMIZERS`.

    Raises:
        InputError: the optimiser cannot serve this machine or these parameters, or a rule fits no parameter.
    """
    groups = parameter_groups(model, settings)
    if name not in OPTIMIZERS:
        raise InputError(f"there is no optimiser {name!r}; there are {', '.join(OPTIMIZERS)}", where="training.optim")
    return OPTIMIZERS[name](model, groups, settings)


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> Groups:
    """What trains, by learning rate and weight decay; the group of the run's own learning rate first."""
    hosts = dict(model.named_modules())
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    idle, nameless = set(settings.rules), set(settings.rules)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = _learning_rate(name, parameter, hosts, settings)
        decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
        fitting = [rule for rule in settings.rules if re.search(rule.pattern, name)]
        nameless.difference_update(fitting)
        if fitting:
            rule = fitting[0]
            idle.discard(rule)
            rate = rate if rule.learning_rate is None else rule.learning_rate
            decay = decay if rule.weight_decay is None else rule.weight_decay
        found.setdefault((rate, decay), []).append(parameter)
    _refuse_idle(idle, nameless)
    order = sorted(found, key=lambda key: key[0] != settings.learning_rate)
    return [{"params": found[key], "lr": key[0], "weight_decay": key[1]} for key in order]


def _refuse_idle(idle: set[GroupRule], nameless: set[GroupRule]) -> None:
    """Rules that no parameter goes by, those that fit no name among them."""
    if not idle:
        return
    told = sorted((rule.pattern, rule in nameless) for rule in idle)
    pattern, fits_nothing = told[0]
    why = "nothing that trains has a name with it" if fits_nothing else "all that it fits goes by an earlier one"
    raise InputError(
        f"{pattern!r} has no effect: {why}",
        where="training.parameter_groups",
        fix="Names look like model.layers.0.self_attn.q_proj.adapters.default.lora_A."
        if fits_nothing
        else "The first that fits is taken: put the narrower pattern first.",
    )


def _learning_rate(
    name: str, parameter: nn.Parameter, hosts: dict[str, nn.Module], settings: OptimizerSettings
) -> float:
    """As peft's `create_loraplus_optimizer` divides them: vectors learn as B does."""
    if settings.loraplus_lr_ratio is None:
        return settings.learning_rate
    host = hosts.get(name.split(f".{AdapterSet.CHILD}.")[0])
    if isinstance(host, nn.Embedding):
        return settings.loraplus_lr_embedding
    fast = name.endswith("lora_B") or parameter.ndim == 1
    return settings.learning_rate * (settings.loraplus_lr_ratio if fast else 1.0)
