"""A run from its config to its report. Read `train` from top to bottom: it is what `lowrank train` does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from lowrank.adapters import AdaLoraConfig, RankBudget, config_of, describe, disabled, orthogonality
from lowrank.config import RunConfig, dump_config, load_config
from lowrank.errors import InputError
from lowrank.recipes.assess import assess
from lowrank.recipes.prepare import base_model, base_tokenizer, batch_plan, put_in, read_examples, swap_attention
from lowrank.recipes.show import open_console, plan_of, show_outcome, show_plan
from lowrank.training.callbacks import Callback, Run
from lowrank.training.evaluate import Evaluation
from lowrank.training.interrupt import stopping_softly
from lowrank.training.loop import fit
from lowrank.training.loss import Autocast, Loss, supervised_loss
from lowrank.training.memory import keep_freed_blocks
from lowrank.training.metrics import FILE as METRICS
from lowrank.training.metrics import MetricsFile
from lowrank.training.optim import build_optimizer
from lowrank.training.periodic import PeriodicEval
from lowrank.training.progress import Screen
from lowrank.training.report import FILE as REPORT
from lowrank.training.report import ReportWriter
from lowrank.training.schedule import build_schedule
from lowrank.training.steps import run_length
from lowrank.weights import save

CONFIG = "config.yaml"


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        output_dir: Adapter (or model), config, metrics and report are in it.
        steps: Optimiser steps taken.
        interrupted: Whether it was stopped before its end.
        before: The base's evaluation, None without evaluation data.
        after: The trained model's, None without evaluation data or when interrupted.
    """

    output_dir: Path
    steps: int
    interrupted: bool
    before: Evaluation | None
    after: Evaluation | None


def train(config: RunConfig | str | Path, overrides: Sequence[str] = ()) -> RunResult:
    """Fine-tunes a model.

    Args:
        config: A config, or the path of one.
        overrides: `section.key=value`, for a path.

    Raises:
        InputError: something in the config, the model or the data cannot be used; nothing has been written.
        JobError: the run failed.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    training = config.training
    output = Path(training.output_dir)
    refuse_a_run_in(output)
    keep_freed_blocks()
    set_seed(training.seed)
    console = open_console()

    # Rows to examples to packs. Before the model: a mistake in a row is found in seconds.
    tokenizer = base_tokenizer(config)
    examples, held_out = read_examples(config, tokenizer)
    plan = batch_plan(config, examples, tokenizer, shuffle=True)
    length = run_length(
        plan,
        accumulation=training.gradient_accumulation_steps,
        epochs=training.num_train_epochs,
        max_steps=training.max_steps,
    )

    # The base model, adapters put in, attention chosen.
    model = base_model(config)
    dtype = model.dtype
    put_in(model, config, plan)
    attention = swap_attention(model, config)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = exact_loss(model, dtype)
    summary = plan_of(config, model, attention, loss, plan, length)
    show_plan(console, summary)

    # Who is told of the run.
    output.mkdir(parents=True, exist_ok=True)
    screen = Screen(console, training.logging_steps)
    report = ReportWriter(output / REPORT, output.name, summary, output / METRICS)
    budget = rank_budget(model, length.steps)
    run = Run(model, output, length.steps, [MetricsFile(output / METRICS), screen, report, *budget])
    evaluate = None if held_out is None else partial(assess, model, tokenizer, held_out, config, loss, screen.task)
    if evaluate is not None and training.eval_steps is not None:
        run.callbacks.append(PeriodicEval(training.eval_steps, partial(evaluate, generate=False)))

    with run.underway():
        before = None
        if evaluate is not None:
            with disabled(model) if describe(model) else nullcontext():
                before = evaluate(generate=training.predict_with_generate)
            run.tell(Callback.on_eval, before)

        (output / CONFIG).write_text(dump_config(config), encoding="utf-8")
        optimise(run, config, plan, loss, budget)
        model.eval()
        save_result(model, tokenizer, output, dtype)
        run.tell(Callback.on_save, output)

        after = None
        if evaluate is not None and not run.interrupted:
            after = evaluate(generate=training.predict_with_generate)
            run.tell(Callback.on_eval, after)

    show_outcome(console, before, after)
    told = f"stopped after step {run.step} of {run.total_steps}: what it learned is in" if run.interrupted else "done:"
    console.print(f"{told} {output}; open {output / REPORT}", highlight=False, soft_wrap=True)
    return RunResult(output, run.step, run.interrupted, before, after)


def refuse_a_run_in(output: Path) -> None:
    """Raises InputError where a run, or anything else, is in the output folder already."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"{output} holds something already; nothing in it was changed",
            where="training.output_dir",
            fix="Give another folder (--set training.output_dir=...), or move that one away.",
        )


def exact_loss(model: PreTrainedModel, dtype: torch.dtype) -> Loss:
    """The loss; where weights train in more digits than the base was asked to have, products stay in the base's."""
    loss = supervised_loss(model)
    return loss if model.dtype == dtype else Autocast(loss, dtype)


def optimise(run: Run, config: RunConfig, plan: Any, loss: Loss, budget: Sequence[AdaLoraBudget]) -> None:
    """Optimiser, schedule, and the loop. Ctrl-C once ends it after the current step."""
    training = config.training
    optimizer = build_optimizer(
        run.model,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        betas=(training.adam_beta1, training.adam_beta2),
        epsilon=training.adam_epsilon,
    )
    warmup = training.warmup_steps or round(training.warmup_ratio * run.total_steps)
    schedule = build_schedule(optimizer, training.lr_scheduler_type, warmup_steps=warmup, total_steps=run.total_steps)
    with stopping_softly(run):
        fit(
            run,
            plan,
            loss,
            optimizer,
            schedule,
            accelerator=Accelerator(cpu=run.model.device.type == "cpu"),
            accumulation=training.gradient_accumulation_steps,
            max_grad_norm=training.max_grad_norm,
            penalty=budget[0].penalty if budget else None,
        )


def save_result(model: Any, tokenizer: Any, output: Path, dtype: torch.dtype) -> None:
    """The adapter, or the whole model where that was trained."""
    if describe(model):
        save(model, output)
        return
    model.to(dtype).save_pretrained(output)
    tokenizer.save_pretrained(output)


class AdaLoraBudget(Callback):
    """Shrinks AdaLoRA's ranks after each step."""

    def __init__(self, model: PreTrainedModel, config: AdaLoraConfig, total_steps: int) -> None:
        self.model, self.config = model, config
        self.budget = RankBudget(model, "default", total_steps)

    def penalty(self) -> torch.Tensor:
        """The orthogonality term of the loss."""
        return self.config.orth_reg_weight * orthogonality(self.model, "default")

    def on_gradients(self, run: Run) -> None:
        """One step of the budget."""
        self.budget.step(run.step)


def rank_budget(model: PreTrainedModel, total_steps: int) -> list[AdaLoraBudget]:
    """AdaLoRA's callback; none for other methods."""
    config = config_of(model, "default") if describe(model) else None
    return [AdaLoraBudget(model, config, total_steps)] if isinstance(config, AdaLoraConfig) else []
