"""How a run begins, up to its first step; `check` goes as far."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from lowrank.config.sections import TrainingSection
from lowrank.recipes.parts.optimisation import optimizer_for, schedule_for
from lowrank.recipes.parts.setup import Setup, own_device
from lowrank.training.callbacks.trackers import chosen_trackers
from lowrank.training.machine.joining import join, not_joined, refuse_half_a_launch
from lowrank.training.machine.launch import refuse_launcher_options
from lowrank.training.rehearsal import rehearse, rehearse_evaluation
from lowrank.training.run import Run

LOGS = "logs"


def launched_device(training: TrainingSection, named: str | None) -> torch.device:
    """The device of this process, which its launcher may have started together with others.

    Args:
        training: Of the run.
        named: The device that the config names.

    Raises:
        InputError: this machine has no such device, the processes were launched in a way that a run does not take, or
            they would share one card.
    """
    refuse_launcher_options(fsdp=training.fsdp)
    refuse_half_a_launch()
    return own_device(named, int(os.environ.get("WORLD_SIZE", "1")))


def joined_accelerator(training: TrainingSection, device: torch.device) -> Accelerator:
    """Joins the other processes, if there are any, and knows the trackers.

    Args:
        training: Of the run.
        device: Of this process.

    Raises:
        InputError: a tracker is not there, or the processes do not find one another.
    """
    join(cuda=device.type == "cuda")
    trackers = chosen_trackers(training.report_to)
    options = ProjectConfiguration(training.output_dir, logging_dir=str(Path(training.output_dir) / LOGS))
    try:
        accelerator = Accelerator(cpu=device.type == "cpu", project_config=options)
    except (RuntimeError, ValueError) as error:
        raise not_joined(error) from error
    accelerator.log_with = [*trackers]  # given to the accelerator, those that it does not find would be left out unsaid
    return accelerator


def new_run(training: TrainingSection, setup: Setup) -> Run:
    """Optimiser and schedule over what trains, before the first step."""
    optimizer = optimizer_for(training, setup.model)
    steps = setup.length.steps
    return Run(
        setup.model,
        optimizer,
        schedule_for(training, optimizer, steps),
        torch.amp.GradScaler(setup.model.device.type, enabled=setup.products.dtype == torch.float16),
        output_dir=Path(training.output_dir),
        total_steps=steps,
        data=setup.plan.fingerprint,
        batches=setup.size.batches,
    )


def try_the_longest(setup: Setup, accelerator: Accelerator, base: str) -> str | None:
    """The longest batch of training, and of the evaluation: a run that will not fit fails before it has written
    anything.

    Args:
        setup: Of the run.
        accelerator: Runs the backward pass.
        base: The name of the base, for messages.

    Returns:
        What is wrong with the loss, in a sentence; None where it is finite.
    """
    remark = rehearse(setup.model, setup.plan, setup.loss, accelerator, base)
    if setup.held_out is not None:
        rehearse_evaluation(setup.model, setup.held_out, setup.loss)
    return remark
