"""What a method does besides its layers in a run: AdaLoRA's budget of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowrank.adapters.inspection import config_of, layers_of
from lowrank.adapters.methods.adalora_budget import Budget
from lowrank.adapters.methods.adalora_budget import orthogonality as of_layers
from lowrank.adapters.record import record_of
from lowrank.adapters.registry import method_of
from lowrank.errors import InputError


def companion(model: nn.Module, adapter: str, total_step: int) -> Any:
    """What an adapter's method wants done in a run of so many steps (`Method.companion`); None for nothing."""
    config = config_of(model, adapter)
    made = method_of(config).companion(config, layers_of(model, adapter), total_step)
    if made is not None:
        record_of(model).configs[adapter] = made.config
    return made


class RankBudget(Budget):
    """Shrinks the ranks of one AdaLoRA adapter to their budget.

    Call `step` after each optimiser step, before the gradients are cleared. The state is in `state_dict`, so that a
    resumed run goes on with the same importances.

    Args:
        model: The wrapped model.
        adapter: The name of an AdaLoRA adapter.
        total_step: Optimiser steps of the whole run.
    """

    def __init__(self, model: nn.Module, adapter: str, total_step: int) -> None:
        config: Any = config_of(model, adapter)
        if config.method_name != "adalora":
            raise InputError(f"{adapter!r} is no AdaLoRA adapter: it has no budget of ranks")
        super().__init__([layer for _, layer in layers_of(model, adapter).values()], config, total_step)
        record_of(model).configs[adapter] = self.config


def orthogonality(model: nn.Module, adapter: str) -> torch.Tensor:
    """Mean over all P and Q of ‖PᵀP - I‖ and ‖QQᵀ - I‖ (equation 4); add `orth_reg_weight` times it to the loss."""
    return of_layers([layer for _, layer in layers_of(model, adapter).values()])
