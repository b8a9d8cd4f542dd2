"""Learning-rate schedules, as a factor of the step. The config reads their names here, so nothing loads torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Span:
    """What a schedule's shape may look at.

    Attributes:
        warmup: Steps in which the learning rate rises.
        total: Steps of the whole run.
        min_ratio: The lowest learning rate, as a share of the highest.
        decay: Of `warmup_stable_decay`: the last so many steps.
    """

    warmup: int
    total: int
    min_ratio: float
    decay: int

    def done(self, step: int) -> float:
        """The share of the steps after the warm-up that is behind `step`."""
        return min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))

    def falling(self, share: float) -> float:
        """Half a cosine from 1 at a share of 0 down to `min_ratio` at 1."""
        return self.min_ratio + (1.0 - self.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * share))


def _inverse_sqrt(step: int, span: Span) -> float:
    timescale = span.warmup or 10_000
    return math.sqrt(timescale / (timescale + step - span.warmup))


def _warmup_stable_decay(step: int, span: Span) -> float:
    """Hu 2024 (MiniCPM): the highest learning rate until the decay begins."""
    begins = max(span.warmup, span.total - span.decay)
    return 1.0 if step < begins else span.falling((step - begins) / max(1, span.total - begins))


SCHEDULES: dict[str, Callable[[int, Span], float]] = {
    "cosine": lambda step, span: 0.5 * (1.0 + math.cos(math.pi * span.done(step))),
    "cosine_with_min_lr": lambda step, span: span.falling(span.done(step)),
    "linear": lambda step, span: 1.0 - span.done(step),
    "constant": lambda step, span: 1.0,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
}
"""The learning rate of a step after the warm-up, the highest counted as 1; by transformers' names."""


def build_schedule(
    optimizer: Optimizer,
    name: str,
    *,
    warmup_steps: int,
    total_steps: int,
    min_lr_ratio: float = 0.0,
    decay_steps: int = 0,
) -> LambdaLR:
    """A linear warm-up over `warmup_steps`, whose first step is not lost to a learning rate of 0; then the shape."""
    from torch.optim.lr_scheduler import LambdaLR

    shape = SCHEDULES[name]
    span = Span(warmup_steps, total_steps, min_lr_ratio, decay_steps)

    def factor(step: int) -> float:
        return (step + 1) / (warmup_steps + 1) if step < warmup_steps else shape(step, span)

    return LambdaLR(optimizer, factor)
