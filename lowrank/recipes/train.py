"""A run from its config to its report. Read `_train` from top to bottom: it is what `lowrank train` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from lowrank.config import RunConfig, load_config
from lowrank.config.sections import TrainingSection
from lowrank.recipes.parts.beginning import joined_accelerator, launched_device, new_run, try_the_longest
from lowrank.recipes.parts.course import begin, evaluate_the_base, evaluate_the_result, save_run
from lowrank.recipes.parts.followers import Followers, followers_of, trackers_of
from lowrank.recipes.parts.less_memory import less_to_load, less_to_train
from lowrank.recipes.parts.products import begun_in, computing_in
from lowrank.recipes.parts.reference import with_pretended_reference, with_reference
from lowrank.recipes.parts.result import RunResult, farewell, try_to_write_card
from lowrank.recipes.parts.resume import (
    day_of,
    describe_start,
    flat,
    on_day,
    own_folder,
)
from lowrank.recipes.parts.setup import Setup, set_up
from lowrank.recipes.parts.show import open_console, plan_of, show_line, show_outcome, show_plan
from lowrank.recipes.parts.starting import with_start
from lowrank.recipes.parts.task_setup import set_up_task
from lowrank.recipes.parts.tasked import with_task
from lowrank.training.callbacks.signals import stopping_softly
from lowrank.training.checkpoints.snapshot import load_model_state
from lowrank.training.checkpoints.state import read_state
from lowrank.training.checkpoints.writer import FOLDER
from lowrank.training.evaluation.best import Best
from lowrank.training.loop import fit
from lowrank.training.machine.determinism import deterministic_kernels
from lowrank.training.machine.memory import few_kernels_kept, freed_blocks_kept
from lowrank.training.machine.ranks import Ranks, joined_ranks
from lowrank.training.machine.shortage import told_when_short
from lowrank.training.run import Callback, Run
from lowrank.training.transforms.neftune import noisy_embeddings

__all__ = ["train"]


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
        resume: Go on with the run in `training.output_dir` from its newest checkpoint, as if it had never stopped: bit
            for bit on a CPU, and on a card under `training.deterministic`.
        callbacks: Told of every moment of the run (`lowrank.Callback`).

    Raises:
        InputError: something in the config, the model or the data cannot be used; nothing has been written.
        JobError: the run failed.
    """
    config = config if isinstance(config, RunConfig) else load_config(config, overrides)
    few_kernels_kept()
    with deterministic_kernels(config.training.deterministic):
        return _train(config, resume=resume, callbacks=callbacks)


def _train(config: RunConfig, *, resume: bool, callbacks: Sequence[Callback]) -> RunResult:
    training, output = config.training, Path(config.training.output_dir)
    device = launched_device(training, config.model.device)
    accelerator = joined_accelerator(training, device)
    ranks = joined_ranks(training.num_processes)
    console = open_console(quiet=not ranks.main)
    given = with_task(with_start(begun_in(config, output if resume else None)))
    config = on_day(given, ranks.first(day_of(given.data.date, output if resume else None)))
    with own_folder(config, output, ranks, resume=resume) as checkpoint:
        if resume:
            show_line(console, describe_start(checkpoint, output))
        set_seed(training.seed)

        # Rows to packs; the base model, adapter put in, attention chosen; what will happen is shown before any work.
        with told_when_short(device, "loading the model and its data", less_to_load(config)):
            setup = (set_up_task if config.tasked else set_up)(config, device, ranks)
        run = new_run(training, setup)
        show_plan(console, plan := plan_of(config, setup))
        with told_when_short(device, "trying the longest batch", less_to_train(config)):
            remark = try_the_longest(with_pretended_reference(setup), accelerator, config.model.name_or_path)
        if remark is not None:
            show_line(console, f"warning: {remark}")

        # What preferences are held to; who is told of the run; the base as it is; the loop; what has come of it.
        setup = with_reference(setup, config, console, ranks)
        trackers = trackers_of(accelerator, output, flat(config.model_dump(mode="json")), console)
        followers = followers_of(training, setup, run, console, plan, ranks, [*trackers, *callbacks])
        run.callbacks = followers.callbacks
        begin(run, computing_in(config if setup.writes_date else given, setup.products), checkpoint, ranks)
        with run.underway(), told_when_short(device, "training", less_to_train(config)):
            if training.eval_on_start and run.step == 0:
                evaluate_the_base(run, followers, goes_on=config.model.adapter is not None)
            _learn(run, training, setup, followers, accelerator, ranks)
            save_run(run, setup, followers, config.data.format, ranks)
            after = evaluate_the_result(run, followers)
        if ranks.main and (remark := try_to_write_card(config, plan, setup, run, after)):
            show_line(console, remark)
        show_outcome(console, run.before, after)
        show_line(console, farewell(run, followers.best, setup.plan, "chat" if setup.task is None else "predict"))
        return RunResult(output, run.step, run.interrupted, run.before, after)


def _learn(
    run: Run, training: TrainingSection, setup: Setup, followers: Followers, accelerator: Accelerator, ranks: Ranks
) -> None:
    """The loop, and which weights come out of it. A signal once ends it after the current step."""
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
            penalty=followers.penalty,
            prepare=setup.prepare(ranks),
        )
    if followers.best is not None and not run.interrupted:
        _take_the_best(run, followers.best)
    run.model.eval()


def _take_the_best(run: Run, best: Best) -> None:
    """Puts the weights of the best checkpoint into the model, where they are not in it already."""
    if best.step in (None, run.step):  # none: a callback has stopped the run before its first evaluation
        return
    path = run.output_dir / FOLDER / f"step-{best.step}"
    load_model_state(run.model, read_state(path)["model"], run.adapter)
