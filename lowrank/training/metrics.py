"""`metrics.jsonl`: one line a step and one an evaluation."""

from __future__ import annotations

import json
import os
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

    def on_skip(self, run: Run, loss: float, grad_norm: float) -> None:
        """One line; a value that is not finite stands in it as text."""
        self._append({"kind": "skip", "step": run.step, "loss": str(loss), "grad_norm": str(grad_norm)})

    def on_eval(self, run: Run, evaluation: Evaluation) -> None:
        """One line."""
        self._append({"kind": "eval", "step": run.step, **evaluation.metrics()})

    def state_dict(self) -> dict[str, Any]:
        """How long the file is."""
        return {"bytes": self.path.stat().st_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cuts off what was written later: it comes again."""
        os.truncate(self.path, state["bytes"])

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
