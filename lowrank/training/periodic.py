"""Evaluation between the steps."""

from __future__ import annotations

from collections.abc import Callable

from lowrank.training.callbacks import Callback, Run, StepMetrics
from lowrank.training.evaluate import Evaluation


class PeriodicEval(Callback):
    """Evaluates every so many steps, the last one left to what follows the training."""

    def __init__(self, every: int, evaluate: Callable[[], Evaluation]) -> None:
        self.every, self.evaluate = every, evaluate

    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        """Evaluates when it is time, and tells the others."""
        if run.step % self.every == 0 and run.step < run.total_steps and not run.stop:
            run.tell(Callback.on_eval, self.evaluate())
