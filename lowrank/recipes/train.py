"""A run from its config to its report. Read `train` from top to bottom: it is what `lowrank train` does."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from rich.console import Console

from lowrank.adapters import describe, disabled
from lowrank.config import RunConfig, dump_config, load_config
from lowrank.config.loading import CONFIG
from lowrank.data import BatchPlan, BatchStream
from lowrank.data.supervision.shared_opening import shared_system
from lowrank.recipes.parts.followers import Crew, crew_of, save_adapter
from lowrank.recipes.parts.model_card import write_card
from lowrank.recipes.parts.optimisation import optimizer_for, schedule_for
from lowrank.recipes.parts.prepare import batch_plan
from lowrank.recipes.parts.resume import (
    dated,
    describe_start,
    own_folder,
    refuse_another_schedule,
)
from lowrank.recipes.parts.setup import Setup, own_device, set_up
from lowrank.recipes.parts.show import open_console, plan_of, rows_of, show_outcome, show_plan
from lowrank.storage.whole_file import write_whole
from lowrank.training.callbacks.metrics_file import FILE as METRICS
from lowrank.training.callbacks.pages import page
from lowrank.training.callbacks.run_report import FILE as REPORT
from lowrank.training.callbacks.run_report import comparison
from lowrank.training.callbacks.signals import saving, stopping_softly
from lowrank.training.callbacks.trackers import chosen_trackers
from lowrank.training.checkpoints.snapshot import load_model_state, restore
from lowrank.training.checkpoints.state import read_state
from lowrank.training.checkpoints.writer import FOLDER
from lowrank.training.evaluation.best import Best
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.loop import fit
from lowrank.training.machine.joining import join, not_joined, refuse_half_a_launch
from lowrank.training.machine.launch import refuse_launcher_options
from lowrank.training.machine.memory import few_kernels_kept, freed_blocks_kept
from lowrank.training.machine.ranks import Ranks, joined_ranks
from lowrank.training.machine.shortage import told_when_short
from lowrank.training.rehearsal import rehearse, rehearse_evaluation
from lowrank.training.run import Callback, Run
from lowrank.training.transforms.neftune import noisy_embeddings
from lowrank.weights.cards import FILE as CARD
from lowrank.weights.files.notes import note_system

LOGS = "logs"


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


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Fine-tunes a model.

    Args:
        config: A config, its sections as a mapping, or the path of one.
        overrides: `section.key=value`, for a mapping or a path.
        resume: Go on with the run in `training.output_dir` from its newest checkpoint, bit for bit as if it had never
            stopped.
        callbacks: Told of every moment of the run (`lowrank.Callback`).

    Raises:
        InputError: something in the config, the model or the data cannot be used; nothing has been written.
        JobError: the run failed.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    few_kernels_kept()
    output = Path(config.training.output_dir)
    accelerator = accelerator_for(config)
    ranks = joined_ranks(config.training.num_processes)
    given, config = config, ranks.first(dated(config, output if resume else None))
    with own_folder(config, output, ranks, resume=resume) as checkpoint:
        console = open_console(quiet=not ranks.main)
        if resume:
            console.print(describe_start(checkpoint, output), highlight=False, soft_wrap=True)
        return run_from(checkpoint, config, given, console, accelerator, ranks, callbacks)


def run_from(
    checkpoint: Path | None,
    config: RunConfig,
    given: RunConfig,
    console: Console,
    accelerator: Accelerator,
    ranks: Ranks,
    callbacks: Sequence[Callback],
) -> RunResult:
    """The run itself, in a folder that is its own; `given` is its config before the day was added."""
    output = Path(config.training.output_dir)
    set_seed(config.training.seed)

    # Rows to packs; the base model, adapter put in, attention chosen; what will happen is shown before any work.
    with told_when_short(own_device(config), "loading the model and its data", advice_for_loading(config)):
        setup = set_up(config, ranks)
    run = new_run(config, setup)
    summary = plan_of(
        config, setup.model, setup.attention, setup.loss, setup.plan, setup.size, setup.length, setup.asking
    )
    show_plan(console, summary)
    if remark := try_the_longest(run, config, setup, accelerator):
        console.print(f"warning: {remark}", highlight=False, soft_wrap=True)

    crew = crew_of(config, setup, run, console, summary, accelerator, ranks, callbacks)
    run.callbacks = crew.callbacks
    begin(run, config if setup.writes_date else given, checkpoint, ranks)
    with run.underway(), told_when_short(run.model.device, "training", advice(config)):
        if crew.evaluate is not None and config.training.eval_on_start and run.step == 0:
            with disabled(run.model) if describe(run.model) else nullcontext():
                run.before = crew.evaluate()
            run.tell(Callback.on_eval, run.before)
        learn(run, config, setup, crew, accelerator, ranks)
        with saving(run):
            if run.interrupted:
                crew.checkpoints.write(run)
            if ranks.main:
                save_result(run.model, setup, output)
                if isinstance(setup.plan, BatchPlan):
                    note_system(output, shared_system(setup.plan.examples, config.data.format))
            run.tell(Callback.on_save, output)
        after = None
        if crew.evaluate is not None and not run.interrupted:
            after = crew.evaluate()
            run.tell(Callback.on_eval, after)

    if ranks.main and (remark := try_to_write_card(config, summary, setup, run, after)):
        console.print(remark, highlight=False, soft_wrap=True)
    show_outcome(console, run.before, after)
    console.print(farewell(run, crew.best, setup.plan), highlight=False, soft_wrap=True)
    return RunResult(output, run.step, run.interrupted, run.before, after)


def accelerator_for(config: RunConfig) -> Accelerator:
    """Joins the other processes, if there are any, and knows the trackers."""
    refuse_launcher_options(fsdp=config.training.fsdp)
    refuse_half_a_launch()
    device = own_device(config)  # refused where this machine has none of that name
    join(cuda=device.type == "cuda")
    output = config.training.output_dir
    trackers = chosen_trackers(config.training.report_to)
    options = ProjectConfiguration(output, logging_dir=str(Path(output) / LOGS))
    try:
        accelerator = Accelerator(cpu=device.type == "cpu", project_config=options)
    except (RuntimeError, ValueError) as error:
        raise not_joined(error) from error
    accelerator.log_with = [*trackers]  # given to the accelerator, those that it does not find would be left out unsaid
    return accelerator


def try_the_longest(run: Run, config: RunConfig, setup: Setup, accelerator: Accelerator) -> str | None:
    """A run that will not fit fails here, before it has written anything; what is wrong with its loss is returned."""
    with told_when_short(run.model.device, "trying the longest batch", advice(config)):
        remark = rehearse(run.model, setup.plan, setup.loss, accelerator, config.model.name_or_path)
        if setup.held_out is not None:
            held_out = batch_plan(config, setup.held_out, setup.tokenizer, shuffle=False)
            rehearse_evaluation(run.model, held_out, setup.loss)
    return remark


def learn(run: Run, config: RunConfig, setup: Setup, crew: Crew, accelerator: Accelerator, ranks: Ranks) -> None:
    """The loop, and which weights come out of it. A signal once ends it after the current step."""
    training = config.training
    alpha = training.neftune_noise_alpha
    noise = nullcontext() if alpha is None else noisy_embeddings(run.model, alpha)
    with stopping_softly(run), noise, freed_blocks_kept():
        fit(
            run,
            setup.plan,
            setup.loss,
            accelerator=accelerator,
            ranks=ranks,
            size=setup.size,
            max_grad_norm=training.max_grad_norm,
            max_skips=training.max_skipped_steps,
            penalty=crew.penalty,
        )
    if crew.best is not None and not run.interrupted:
        take_the_best(run, crew.best)
    run.model.eval()


def new_run(config: RunConfig, setup: Setup) -> Run:
    """Optimiser and schedule over what trains, before the first step."""
    optimizer = optimizer_for(config.training, setup.model)
    steps = setup.length.steps
    return Run(
        setup.model,
        optimizer,
        schedule_for(config.training, optimizer, steps),
        torch.amp.GradScaler(setup.model.device.type, enabled=setup.dtype == torch.float16),
        output_dir=Path(config.training.output_dir),
        total_steps=steps,
        data=setup.plan.fingerprint,
        batches=setup.size.batches,
    )


def begin(run: Run, config: RunConfig, checkpoint: Path | None, ranks: Ranks) -> None:
    """Takes up a checkpoint, or makes the output folder."""
    if ranks.index > 0:  # dropout is another one in each process; adapters began alike
        torch.manual_seed(config.training.seed + ranks.index)
    if checkpoint is not None:
        state = read_state(checkpoint)
        refuse_another_schedule(config, state["total_steps"], run.total_steps, state["step"])
        restore(run, state, ranks)
    if ranks.main:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            (run.output_dir / METRICS).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        write_whole(run.output_dir / CONFIG, dump_config(config))
    ranks.wait()


def take_the_best(run: Run, best: Best) -> None:
    """Puts the weights of the best checkpoint into the model, where they are not in it already."""
    if best.step in (None, run.step):  # none: a callback has stopped the run before its first evaluation
        return
    path = run.output_dir / FOLDER / f"step-{best.step}"
    load_model_state(run.model, read_state(path)["model"])


def save_result(model: Any, setup: Setup, output: Path) -> None:
    """The adapter, or the whole model where that was trained."""
    if describe(model):
        save_adapter(model, setup.tokenizer, output)
        return
    model.to(setup.dtype).save_pretrained(output)
    setup.tokenizer.save_pretrained(output)


def try_to_write_card(
    config: RunConfig, summary: Mapping[str, str], setup: Setup, run: Run, after: Evaluation | None
) -> str | None:
    """The adapter's `README.md`; why there is none from this run, where it is so. A whole model gets none."""
    if not describe(run.model):
        return None
    of = f"{run.step:,} of {run.total_steps:,}" if run.step < run.total_steps else f"{run.step:,}"
    done = {**summary, "steps": f"{of} steps taken; planned: {summary['steps']}"}
    try:
        if write_card(run.output_dir, config, done, rows_of(setup.plan), run.before, after):
            return None
    except OSError as error:  # the adapter is there, and the run has not failed for want of its card
        return f"warning: {run.output_dir / CARD} cannot be written: {error.strerror}"
    return f"{run.output_dir / CARD} was written or changed by a person: it stays as it is"


def farewell(run: Run, best: Best | None, plan: BatchPlan | BatchStream) -> str:
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
    if isinstance(plan, BatchStream):
        ended += f" From the stream: {plan.counts}."
        ended += "".join(f"\nleft out: {reason}" for reason in plan.counts.reasons)
    place = shlex.quote(str(run.output_dir))
    how = f"To go on: lowrank train {place} --resume" if run.interrupted else f"To talk to it: lowrank chat {place}"
    return f"{ended}\n{how}"


def advice(config: RunConfig) -> list[str]:
    """What needs less memory than this config, the first thing to try first."""
    training = config.training
    if config.data.packing:
        tokens = training.tokens_per_batch or config.data.max_length
        less = f"training.tokens_per_batch below {tokens:,} (data.max_length is {config.data.max_length:,})"
    else:
        less = f"training.per_device_train_batch_size below {training.per_device_train_batch_size}"
    found = [less]
    if not training.gradient_checkpointing:
        found.append("training.gradient_checkpointing: true")
    if config.quantization is None:
        found.append("quantization.load_in_4bit: true")
    return found


def advice_for_loading(config: RunConfig) -> list[str]:
    """The same where it is the base alone that does not fit."""
    found = [] if config.quantization is not None else ["quantization.load_in_4bit: true"]
    if not config.training.fsdp:
        found.append("several processes with training.fsdp: true")
    return [*found, f"a smaller base than {config.model.name_or_path}"]
