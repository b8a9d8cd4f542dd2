"""Which evaluation of a run was the best."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lowrank.errors import InputError

if TYPE_CHECKING:
    from lowrank.training.evaluation.evaluation import Evaluation

GREATER_IS_BETTER = {
    "loss": False,
    "exact_match": True,
    "accuracy": True,
    "f1": True,
    "precision": True,
    "recall": True,
    "mcc": True,
    "recall@1": True,
    "recall@10": True,
    "ndcg@10": True,
    "pearson": True,
    "mse": False,
    "margin": True,
}
"""The metrics that a run can be judged by; the config reads their names here, so nothing loads torch."""


class Best:
    """The best evaluation so far by one metric; of equal ones, the first.

    Attributes:
        metric: One of `GREATER_IS_BETTER`.
        step: After which step it was, None before the first evaluation.
        value: What it was.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.step: int | None = None
        self.value: float | None = None

    def note(self, step: int, evaluation: Evaluation) -> bool:
        """Whether an evaluation is better than all before; it is the best from then on."""
        value = _value_of(evaluation, self.metric)
        if self.value is not None and not better(self.metric, value, self.value):
            return False
        self.step, self.value = step, value
        return True

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"step": self.step, "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self.step, self.value = state["step"], state["value"]


def better(metric: str, value: float, than: float) -> bool:
    """Whether `value` of a metric is better; any number is better than none (nan), and none never is."""
    if math.isnan(than):
        return not math.isnan(value)
    return value > than if GREATER_IS_BETTER[metric] else value < than


def _value_of(evaluation: Evaluation, metric: str) -> float:
    """The metric of an evaluation.

    Raises:
        InputError: it was not measured.
    """
    value = getattr(evaluation, metric, None)
    value = (evaluation.scores or {}).get(metric) if value is None else value
    if value is None and evaluation.scores is not None:
        raise InputError(
            f"{metric} is not measured in this run",
            where="training.metric_for_best_model",
            fix=f"Take one of loss, {', '.join(evaluation.scores)}.",
        )
    if value is None:
        raise InputError(
            f"{metric} is not measured in this run",
            where="training.metric_for_best_model",
            fix="Set training.predict_with_generate: true, or take loss.",
        )
    return float(value)
