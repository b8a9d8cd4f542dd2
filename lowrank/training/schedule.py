"""Learning-rate schedules, as a factor of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Shape = Callable[[float], float]

SHAPES: dict[str, Shape] = {
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
    "constant": lambda done: 1.0,
}
"""What is left of the learning rate when a share `done` of the steps after the warm-up is over."""


def build_schedule(
    optimizer: torch.optim.Optimizer, name: str, *, warmup_steps: int, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear warm-up over `warmup_steps`, then the shape down to the end of the run."""
    shape = SHAPES[name]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return shape(min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
