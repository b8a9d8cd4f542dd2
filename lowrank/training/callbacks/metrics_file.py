"""`metrics.jsonl`: one line a step and one an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowrank.storage.whole_file import write_whole
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.run import Callback, Run, StepMetrics

FILE = "metrics.jsonl"


class MetricsFile(Callback):
    """Appends the figures of each step and evaluation. What a full disk has no room for is kept, and follows later."""

    def __init__(self, path: Path, told: Callable[[str], object] = print) -> None:
        """`told` shows a person a line."""
        self.path, self.told = path, told
        self._left = b""
        self._warned = False

    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        self._append({"kind": "step", **metrics.as_dict()})

    def on_skip(self, run: Run, loss: float, grad_norm: float) -> None:
        """One line; a value that is not finite stands in it as text."""
        self._append({"kind": "skip", "step": run.step, "loss": str(loss), "grad_norm": str(grad_norm)})

    def on_eval(self, run: Run, evaluation: Evaluation) -> None:
        self._append({"kind": "eval", "step": run.step, **evaluation.metrics()})

    def on_run_end(self, run: Run) -> None:
        """What is left; what has no room even now is told."""
        self._write()
        if self._left:
            lines = len(self._left.splitlines())
            self.told(f"warning: the last {lines} lines of {self.path} could not be written.")

    def state_dict(self) -> dict[str, Any]:
        """All lines so far: a checkpoint does not rest on a file beside it that may be lost."""
        written = self.path.read_bytes() if self.path.exists() else b""
        return {"lines": (written + self._left).decode()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back to them: what was written later comes again."""
        write_whole(self.path, state["lines"])

    def _append(self, line: dict[str, Any]) -> None:
        self._left += json.dumps(line).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        if not self._left:
            return
        try:
            with self.path.open("ab", buffering=0) as file:
                while self._left:
                    self._left = self._left[file.write(self._left) :]
        except OSError as error:
            if not self._warned:
                self.told(f"warning: {error}; the figures follow when there is room. Make room in {self.path.parent}.")
            self._warned = True
        else:
            self._warned = False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`, in order; the last one may be under way."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
