"""Figures of a run for TensorBoard, wandb, trackio, mlflow and the others that accelerate knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from lowrank.errors import InputError
from lowrank.training.callbacks import Callback, Run, StepMetrics
from lowrank.training.evaluate import Evaluation


def chosen_trackers(asked: str | Sequence[str]) -> list[str]:
    """The trackers to report to.

    Args:
        asked: Names; "auto" for TensorBoard where it is installed; "none".

    Raises:
        InputError: one is not known, or not installed: accelerate itself would leave it out without a word.
    """
    installed = {str(tracker) for tracker in get_available_trackers()}
    if asked in ("auto", "none"):
        return ["tensorboard"] if asked == "auto" and "tensorboard" in installed else []
    names = [asked] if isinstance(asked, str) else list(asked)
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))
            raise InputError(f"there is no tracker {name!r}; known are {known}", where="training.report_to")
        if name not in installed:
            raise InputError(f"{name} is not installed", where="training.report_to", fix=f"pip install {name}")
    return names


class Trackers(Callback):
    """Hands each step's figures and each evaluation's on, until a tracker cannot write: training goes on without."""

    def __init__(
        self,
        accelerator: Accelerator,
        project: str,
        config: Mapping[str, Any],
        told: Callable[[str], object] = print,
    ) -> None:
        """Of a run.

        Args:
            accelerator: Made with `log_with` and a logging folder.
            project: The name that the trackers show.
            config: What they show as its settings; flat.
            told: Shows a person a line.
        """
        self.accelerator, self.project, self.config, self.told = accelerator, project, config, told
        self._gone = False

    def on_run_start(self, run: Run) -> None:
        """Opens them."""
        plain = (int, float, str, bool)
        shown = {key: value if isinstance(value, plain) else str(value) for key, value in self.config.items()}
        self.accelerator.init_trackers(self.project, config=shown)

    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        """Loss, learning rate, gradient norm, speed, memory."""
        figures = {f"train/{name}": value for name, value in metrics.as_dict().items() if name != "step"}
        self._log(figures, run.step)

    def on_eval(self, run: Run, evaluation: Evaluation) -> None:
        """Loss, perplexity, exact match."""
        figures = {f"eval/{name.removeprefix('eval_')}": value for name, value in evaluation.metrics().items()}
        self._log(figures, run.step)

    def on_run_end(self, run: Run) -> None:
        """Closes them."""
        for tracker in self.accelerator.trackers:
            with suppress(OSError) if self._gone else nullcontext():
                tracker.finish()

    def _log(self, figures: dict[str, float], step: int) -> None:
        if self._gone:
            return
        try:
            self.accelerator.log(figures, step=step)
        except OSError as error:
            self._gone = True
            self.told(f"warning: the trackers get nothing more ({error}); metrics.jsonl has all figures.")
