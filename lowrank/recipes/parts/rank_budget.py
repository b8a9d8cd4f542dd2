"""AdaLoRA's budget of ranks as a callback of the run."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from lowrank.adapters import AdaLoraConfig, RankBudget, config_of, describe, orthogonality
from lowrank.training.run import Callback, Run


class AdaLoraBudget(Callback):
    """Shrinks AdaLoRA's ranks after each step."""

    def __init__(self, model: PreTrainedModel, config: AdaLoraConfig, total_steps: int) -> None:
        self.model, self.config = model, config
        self.budget = RankBudget(model, "default", total_steps)

    def penalty(self) -> torch.Tensor:
        """The orthogonality term of the loss."""
        return self.config.orth_reg_weight * orthogonality(self.model, "default")

    def on_gradients(self, run: Run) -> None:
        """One step of the budget."""
        self.budget.step(run.step)

    def state_dict(self) -> dict[str, Any]:
        """The importances."""
        return self.budget.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them up."""
        self.budget.load_state_dict(state)


def rank_budget(model: PreTrainedModel, total_steps: int) -> list[AdaLoraBudget]:
    """AdaLoRA's callback; none for other methods."""
    config = config_of(model, "default") if describe(model) else None
    return [AdaLoraBudget(model, config, total_steps)] if isinstance(config, AdaLoraConfig) else []
