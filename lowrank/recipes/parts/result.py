"""What a run leaves: the adapter or the model, its card, and what is said at the end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.adapters import describe
from lowrank.config import RunConfig
from lowrank.data.batches.order import Batches
from lowrank.data.supervision.shared_opening import shared_system
from lowrank.recipes.parts.followers import save_adapter
from lowrank.recipes.parts.model_card import write_card
from lowrank.recipes.parts.setup import Setup
from lowrank.recipes.parts.show import rows_of
from lowrank.training.callbacks.pages import page
from lowrank.training.callbacks.run_report import FILE as REPORT
from lowrank.training.callbacks.run_report import comparison
from lowrank.training.evaluation.best import Best
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.run import Run
from lowrank.weights.cards import FILE as CARD
from lowrank.weights.files.notes import note_system


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        output_dir: Adapter (or model), config, metrics and report are in it.
        steps: Optimiser steps taken.
        interrupted: Whether it was stopped before its end.
        before: The base's evaluation, None without evaluation data or with `eval_on_start: false`.
        after: The trained model's, None without evaluation data or when interrupted.
    """

    output_dir: Path
    steps: int
    interrupted: bool
    before: Evaluation | None
    after: Evaluation | None

    def _repr_html_(self) -> str:
        """What a notebook shows: the figures of the page, and where it is."""
        report = self.output_dir / REPORT
        return page(
            "result",
            folder=self.output_dir,
            steps=f"{self.steps:,}",
            interrupted=self.interrupted,
            report=report if report.exists() else None,
            comparison=comparison(self.before, self.after),
        )


def save_result(run: Run, setup: Setup, format: str | None) -> None:
    """The adapter, or the whole model where that was trained, and the system message that its rows shared.

    Args:
        run: That has ended.
        setup: It began with.
        format: Of the rows, where the config names it.
    """
    model: Any = run.model
    if describe(model):
        save_adapter(model, setup.tokenizer, run.output_dir, run.adapter)
    else:
        model.to(setup.dtype).save_pretrained(run.output_dir)
        setup.tokenizer.save_pretrained(run.output_dir)
    if setup.plan.examples is not None and setup.task is None:
        note_system(run.output_dir, shared_system(setup.plan.examples, format))


def try_to_write_card(
    config: RunConfig, summary: Mapping[str, str], setup: Setup, run: Run, after: Evaluation | None
) -> str | None:
    """The adapter's `README.md`; why there is none from this run, where it is so. A whole model gets none."""
    if not describe(run.model):
        return None
    of = f"{run.step:,} of {run.total_steps:,}" if run.step < run.total_steps else f"{run.step:,}"
    done = {**summary, "steps": f"{of} steps taken; planned: {summary['steps']}"}
    try:
        if write_card(run.output_dir, config, done, rows_of(setup.plan), run.before, after, setup.task):
            return None
    except OSError as error:  # the adapter is there, and the run has not failed for want of its card
        return f"warning: {run.output_dir / CARD} cannot be written: {error.strerror}"
    return f"{run.output_dir / CARD} was written or changed by a person: it stays as it is"


def farewell(run: Run, best: Best | None, plan: Batches, verb: str = "chat") -> str:
    """The last lines: where everything is, what was out of the ordinary, and how to go on."""
    report = f"open {run.output_dir / REPORT}"
    if run.interrupted:
        ended = f"stopped after step {run.step} of {run.total_steps}: what it learned is in {run.output_dir}; {report}."
    else:
        ended = f"done: {run.output_dir}; {report}."
    if run.stop and not run.interrupted:
        ended += f" It stopped early, after step {run.step} of {run.total_steps}."
    if best is not None and best.step is not None and not run.interrupted:
        ended += f" The weights are those of step {best.step}, with the best {best.metric} ({best.value:.4f})."
    if run.skipped:
        ended += f" {run.skipped} steps were skipped."
    if plan.examples is None:
        ended += f" From the stream: {plan.counts}."
        ended += "".join(f"\nleft out: {reason}" for reason in plan.reasons)
    place = shlex.quote(str(run.output_dir))
    how = f"To go on: lowrank train {place} --resume" if run.interrupted else _how_to_ask(verb, place)
    return f"{ended}\n{how}"


def _how_to_ask(verb: str, place: str) -> str:
    return (
        f"To talk to it: lowrank chat {place}" if verb == "chat" else f'To ask it: lowrank predict {place} --text "..."'
    )
