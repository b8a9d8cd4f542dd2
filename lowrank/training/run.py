"""A run as others see it, and the moments at which they are told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch

from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.steps import Position

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimiser step.

    Attributes:
        step: From 1.
        epoch: Epochs done, with the part of the current one.
        loss: Mean over the step's supervised tokens.
        learning_rate: That the step was taken with.
        grad_norm: Before clipping.
        tokens: Tokens in the step, padding not counted.
        supervised: Those that carry loss.
        seconds: Duration, waiting for data included.
        data_seconds: Of these, spent waiting for data.
        peak_bytes: The most memory that was held so far: of the device, or of the process on a CPU.
        figures: What else the loss tells of the step, by name.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised: int
    seconds: float
    data_seconds: float
    peak_bytes: int
    figures: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        """For `metrics.jsonl`."""
        speed = {"tokens_per_second": self.tokens, "supervised_per_second": self.supervised}
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "figures"}
        return {**own, **self.figures, **{name: count / self.seconds for name, count in speed.items()}}


class Callback:
    """Override the moments that matter; each does nothing by default."""

    def on_run_start(self, run: Run) -> None:
        """Before anything is evaluated or trained."""

    def on_gradients(self, run: Run) -> None:
        """After an optimiser step, while its gradients are still there."""

    def on_step_end(self, run: Run, metrics: StepMetrics) -> None:
        """After each optimiser step."""

    def on_skip(self, run: Run, loss: float, grad_norm: float) -> None:
        """After a step that was not taken, because its loss or a gradient was not finite."""

    def on_eval(self, run: Run, evaluation: Evaluation) -> None:
        """After an evaluation: of the base before the first step, of the trained model after the last, or between."""

    def on_save(self, run: Run, path: Path) -> None:
        """After the adapter (or the model), or a checkpoint, was written to `path`."""

    def on_run_end(self, run: Run) -> None:
        """When all is done, and also when the run breaks off."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: tables, lists, numbers, texts and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave, when a run is resumed."""


@dataclass
class Run:
    """What is trained with what, where the run stands, who is told of it, and how it may be stopped.

    Attributes:
        model: Under training.
        optimizer: Over its trainable parameters.
        schedule: Of the learning rate.
        scaler: Of the loss, for float16; it does nothing for other dtypes.
        output_dir: Where the run writes.
        total_steps: Optimiser steps that it will take.
        data: Fingerprint of the examples.
        batches: In a step, over all processes.
        callbacks: Told of each moment, in this order.
        step: Optimiser steps behind it, those that were skipped among them.
        position: What is behind it of the data.
        skipped: Steps that were not taken because something in them was not finite.
        before: The evaluation of the base.
        stop: Set it, and training ends after the current step.
        interrupted: Whether a signal asked for the end.
        adapter: That is trained; others on the model are none of its business.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    output_dir: Path
    total_steps: int
    data: str = ""
    batches: int = 1
    callbacks: list[Callback] = field(default_factory=list)
    step: int = 0
    position: Position = field(default_factory=Position)
    skipped: int = 0
    before: Evaluation | None = None
    stop: bool = False
    interrupted: bool = False
    adapter: str = "default"

    def tell(self, moment: Callable[Concatenate[Any, Run, P], None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Calls every callback's method of that name: `run.tell(Callback.on_eval, evaluation)`."""
        for callback in self.callbacks:
            getattr(callback, moment.__name__)(self, *args, **kwargs)

    @contextmanager
    def underway(self) -> Iterator[None]:
        """Tells of the run's start, and of its end however it comes."""
        try:
            self.tell(Callback.on_run_start)
            yield
        finally:
            self.tell(Callback.on_run_end)
