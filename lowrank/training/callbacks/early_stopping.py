"""Early stopping: the run ends when evaluations have not got better for a while."""

from __future__ import annotations

from typing import Any

from lowrank.training.evaluation.best import Best
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.run import Callback, Run


class EarlyStopping(Callback):
    """Stops the run after so many evaluations in a row without a better one."""

    def __init__(self, metric: str, patience: int) -> None:
        self.best, self.patience = Best(metric), patience
        self._in_vain = 0

    def on_run_start(self, run: Run) -> None:
        """Does not go on with a run that was over."""
        run.stop = run.stop or self._in_vain >= self.patience

    def on_eval(self, run: Run, evaluation: Evaluation) -> None:
        """Counts; the base's own evaluation does not."""
        if run.step == 0:
            return
        self._in_vain = 0 if self.best.note(run.step, evaluation) else self._in_vain + 1
        if self._in_vain >= self.patience:
            run.stop = True

    def state_dict(self) -> dict[str, Any]:
        """The best so far, and how many came after it."""
        return {"best": self.best.state_dict(), "in_vain": self._in_vain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best.load_state_dict(state["best"])
        self._in_vain = state["in_vain"]
