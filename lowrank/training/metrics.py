"""`metrics.jsonl`: one line a step and one an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowrank.training.callbacks import Callback, Run, StepMetrics
from lowrank.training.evaluate import Evaluation

FILE = "metrics.jsonl"


class MetricsFile(Callback):
    """Appends the figures of each step and evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        """One line."""
        self._append({"kind": "step", **metrics.as_dict()})

    def on_eval(self, run: Run, evaluation: Evaluation) -> None:
        """One line."""
        self._append({"kind": "eval", "step": run.step, **evaluation.metrics()})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
