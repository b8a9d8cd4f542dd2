"""Evaluation between the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.run import Callback, Run, StepMetrics


class PeriodicEval(Callback):
    """Evaluates every so many steps. One that fell together with a stop is made up for when the run goes on."""

    def __init__(self, every: int, evaluate: Callable[[], Evaluation], *, last: bool) -> None:
        """With `last`, after the last step as well: without, that is left to what follows the training."""
        self.every, self.evaluate, self.last = every, evaluate, last
        self._owed = False

    def on_run_start(self, run: Run) -> None:
        """Makes up for it."""
        if self._owed:
            self._owed = False
            run.tell(Callback.on_eval, self.evaluate())

    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        """Evaluates when it is time, and tells the others."""
        self._evaluate_if_due(run)

    def on_skip(self, run: Run, loss: float, grad_norm: float) -> None:
        """The same: a step that was not taken has its number too."""
        self._evaluate_if_due(run)

    def state_dict(self) -> dict[str, Any]:
        """Whether one is owed."""
        return {"owed": self._owed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._owed = state["owed"]

    def _evaluate_if_due(self, run: Run) -> None:
        due = self.last if run.step == run.total_steps else run.step % self.every == 0
        if due and run.stop:
            self._owed = True
        elif due:
            run.tell(Callback.on_eval, self.evaluate())
