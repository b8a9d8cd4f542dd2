"""Who is told of a run: what writes, shows, evaluates and keeps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lowrank.adapters import describe
from lowrank.config.sections import TrainingSection
from lowrank.recipes.parts.assess import assess
from lowrank.recipes.parts.companion import companions
from lowrank.recipes.parts.preference_assess import assess_preferences
from lowrank.recipes.parts.setup import Setup
from lowrank.recipes.parts.show import show_line
from lowrank.recipes.parts.task_assess import assess_task
from lowrank.training.callbacks.early_stopping import EarlyStopping
from lowrank.training.callbacks.metrics_file import FILE as METRICS
from lowrank.training.callbacks.metrics_file import MetricsFile
from lowrank.training.callbacks.periodic import PeriodicEval
from lowrank.training.callbacks.progress import Screen
from lowrank.training.callbacks.run_report import FILE as REPORT
from lowrank.training.callbacks.run_report import ReportWriter
from lowrank.training.callbacks.trackers import Trackers
from lowrank.training.checkpoints.keeping import Keeping
from lowrank.training.checkpoints.writer import Checkpoints
from lowrank.training.evaluation.best import Best
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.machine.ranks import Ranks
from lowrank.training.run import Callback, Run
from lowrank.weights import save
from lowrank.weights.files.notes import write_notes

Evaluate = Callable[[], Evaluation]
Told = Callable[[str], object]


@dataclass(frozen=True)
class Followers:
    """What a run goes with.

    Attributes:
        callbacks: All of them, in the order in which they are told.
        evaluate: Evaluates the model as it is; None where the config names nothing to evaluate on.
        checkpoints: The callback that writes them.
        best: Which evaluation was the best; None where the last weights are what is wanted.
        penalty: Added to each step's loss; None for methods without one.
    """

    callbacks: list[Callback]
    evaluate: Evaluate | None
    checkpoints: Checkpoints
    best: Best | None
    penalty: Callable[[], torch.Tensor] | None


def followers_of(
    training: TrainingSection,
    setup: Setup,
    run: Run,
    console: Console,
    summary: Mapping[str, str],
    ranks: Ranks,
    more: Sequence[Callback],
    screen: Screen | None = None,
    acting: Callable[[], AbstractContextManager[None]] = nullcontext,
    keeping: Keeping | None = None,
) -> Followers:
    """The callbacks that a config asks for, and `more`. One process writes and shows; all evaluate and gather.

    Args:
        training: The config's section.
        setup: Of the run.
        run: That they follow.
        console: What is shown goes there.
        summary: Of the plan, for the page.
        ranks: The run's processes.
        more: Told before a checkpoint is written.
        screen: In place of one of the run's own.
        acting: Opened for each evaluation: has the run's adapter act, where others are on the model.
        keeping: What is done with checkpoints, in place of what the config says.
    """
    output = run.output_dir
    screen = Screen(console, training.logging_steps) if screen is None else screen
    told = partial(show_line, console)
    writers = [
        MetricsFile(output / METRICS, told),
        screen,
        ReportWriter(output / REPORT, output.name, summary, output / METRICS, told=told),
    ]
    evaluate = _evaluation_of(setup, screen, ranks, acting)
    budget = companions(setup.model, run.total_steps)
    best = Best(training.metric_for_best_model) if training.load_best_model_at_end else None
    checkpoints = _checkpoints_of(keeping or keeping_of(training), run, setup.tokenizer, told, best, ranks)
    callbacks = [
        *(writers if ranks.main else []),
        *budget,
        *_periodic_evaluation(training, evaluate),
        *more,
        checkpoints,
    ]
    return Followers(callbacks, evaluate, checkpoints, best, budget[0].penalty if budget else None)


def trackers_of(
    accelerator: Accelerator, output: Path, settings: Mapping[str, Any], console: Console
) -> list[Callback]:
    """TensorBoard and the like, where the accelerator was made with any; `settings` are logged with the run."""
    if not accelerator.log_with:
        return []
    return [Trackers(accelerator, output.resolve().name, settings, partial(show_line, console))]


def _evaluation_of(
    setup: Setup, screen: Screen, ranks: Ranks, acting: Callable[[], AbstractContextManager[None]]
) -> Evaluate | None:
    """Evaluates the model as it is; None where the config names nothing to evaluate on."""
    if setup.held_out is None:
        return None
    if setup.task is not None:
        held = (setup.model, setup.tokenizer, setup.held_out, setup.task, screen.task, setup.products.dtype, ranks)
        return partial(assess_task, *held)
    held_out, judge = setup.held_out, setup.judge
    after = (screen.task, setup.exam, ranks)

    def evaluate() -> Evaluation:
        with acting():
            if judge is not None:
                return assess_preferences(setup.model, setup.tokenizer, held_out, judge, *after)
            return assess(setup.model, setup.tokenizer, held_out, setup.plain_loss, *after)

    return evaluate


def _periodic_evaluation(training: TrainingSection, evaluate: Evaluate | None) -> list[Callback]:
    """Evaluations between the steps, where the config asks for them."""
    every = training.eval_steps
    if evaluate is None or every is None:
        return []
    found: list[Callback] = [PeriodicEval(every, evaluate, last=training.load_best_model_at_end)]
    if training.early_stopping_patience is not None:
        found.append(EarlyStopping(training.metric_for_best_model, training.early_stopping_patience))
    return found


def save_adapter(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, adapter: str = Run.adapter) -> None:
    """Writes the adapter, and what it is asked and answers with: tokenizer, chat template, tokens that end answers."""
    write_notes(folder, model, tokenizer)
    save(model, folder, adapter, overwrite=True)


def _checkpoints_of(
    keeping: Keeping,
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    told: Told,
    best: Best | None,
    ranks: Ranks,
) -> Checkpoints:
    """Writes the run's checkpoints."""
    write = partial(save_adapter, run.model, tokenizer, adapter=run.adapter)
    return Checkpoints(
        write if describe(run.model) else lambda folder: None,
        told,
        keeping,
        best=best,
        ranks=ranks,
    )


def keeping_of(training: TrainingSection) -> Keeping:
    """What the config does with checkpoints."""
    return Keeping(training.save_total_limit, training.save_steps, training.save_minutes)
