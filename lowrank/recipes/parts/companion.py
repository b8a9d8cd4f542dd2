"""What the adapter's method does besides its layers (AdaLoRA's budget of ranks), as a callback of the run."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from lowrank.adapters import companion, describe
from lowrank.training.run import Callback, Run


class Companion(Callback):
    """Acts after each step.

    Args:
        made: What the method gives (`Method.companion`).
    """

    def __init__(self, made: Any) -> None:
        self.made = made

    def penalty(self) -> torch.Tensor:
        """Its term of the loss."""
        return self.made.penalty()

    def on_gradients(self, run: Run) -> None:
        """One step."""
        self.made.step(run.step)

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return self.made.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what was remembered."""
        self.made.load_state_dict(state)


def companions(model: PreTrainedModel, total_steps: int) -> list[Companion]:
    """The callback of the adapter's method, where it has one."""
    made = companion(model, "default", total_steps) if describe(model) else None
    return [] if made is None else [Companion(made)]
