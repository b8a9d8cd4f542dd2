"""Figures of a run for TensorBoard, wandb, trackio, mlflow and the others that accelerate knows."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from lowrank.errors import InputError, first_line
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.run import Callback, Run, StepMetrics


def chosen_trackers(asked: str | Sequence[str]) -> list[str]:
    """The trackers to report to.

    Args:
        asked: Names; "auto" for TensorBoard where it is installed; "none".

    Raises:
        InputError: one is not known, or not installed: accelerate itself would leave it out without a word.
    """
    if asked in ("auto", "none"):
        return ["tensorboard"] if asked == "auto" and _installed("tensorboard") else []
    names = [asked] if isinstance(asked, str) else list(asked)
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))
            raise InputError(f"there is no tracker {name!r}; known are {known}", where="training.report_to")
        if not _installed(name):
            raise InputError(
                f"{name} is not installed", where="training.report_to", fix=f"Install it: `pip install {name}`."
            )
    return names


def _installed(name: str) -> bool:
    modules = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
    return any(find_spec(module) is not None for module in modules)


class Trackers(Callback):
    """Hands each step's figures and each evaluation's on. A tracker that fails, at its start or later, is told of once
    and left out: training goes on without it, and `metrics.jsonl` has all figures."""

    def __init__(
        self,
        accelerator: Accelerator,
        project: str,
        config: Mapping[str, Any],
        told: Callable[[str], object] = print,
    ) -> None:
        """Of a run.

        Args:
            accelerator: Made with `log_with` and a logging folder; it holds the trackers.
            project: The name that the trackers show, as far as they can: what is no letter, digit, dot, dash or
                underscore becomes one. `WANDB_PROJECT` and `MLFLOW_EXPERIMENT_NAME` stand before it.
            config: What they show as its settings; flat.
            told: Shows a person a line.
        """
        self.accelerator, self.config, self.told = accelerator, config, told
        self.project = re.sub(r"[^\w.-]", "_", project) or "run"
        self._names = [str(name) for name in accelerator.log_with or []]

    def on_run_start(self, run: Run) -> None:
        """Opens them."""
        plain = (int, float, str, bool)
        shown = {key: value if isinstance(value, plain) else str(value) for key, value in self.config.items()}
        self.accelerator.trackers = []
        for name in self._names:
            with self._kept(name, "could not be started and gets nothing"):
                tracker = self._made(name)
                tracker.start()
                self.accelerator.trackers.append(tracker)
        for tracker in self.accelerator.trackers:
            with self._kept(tracker.name, "does not know the run's settings"):
                tracker.store_init_configuration(shown)

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
            with self._kept(tracker.name, "could not be closed; its last figures may be missing"):
                tracker.finish()
        self.accelerator.trackers = []

    def _log(self, figures: dict[str, float], step: int) -> None:
        for tracker in list(self.accelerator.trackers):
            with self._kept(tracker.name, "gets nothing more") as whole:
                tracker.log(figures, step=step)
                whole.append(True)
            if not whole:
                self.accelerator.trackers.remove(tracker)

    @contextmanager
    def _kept(self, name: str, what: str) -> Iterator[list[bool]]:
        """The run, whatever a tracker raises: it is another program's, and may be missing a server, a key or a disk."""
        try:
            yield []
        except (Exception, SystemExit) as error:
            why = first_line(error)
            self.told(f"warning: {name} {what} ({why}); metrics.jsonl has all figures.")

    def _made(self, name: str) -> GeneralTracker:
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        project, options = self.project, {}
        if name == "wandb" and (theirs := os.environ.get("WANDB_PROJECT")):
            project, options = theirs, {} if os.environ.get("WANDB_NAME") else {"name": self.project}
        where = [self.accelerator.logging_dir] if kind.requires_logging_directory else []
        return kind(project, *where, **options)
