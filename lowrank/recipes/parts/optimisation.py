"""Optimiser and schedule, as a config's training section names them."""

from __future__ import annotations

import torch
from torch import nn

from lowrank.config.sections import TrainingSection
from lowrank.training.optimisers.build import build_optimizer
from lowrank.training.optimisers.schedule import build_schedule
from lowrank.training.optimisers.settings import GroupRule, OptimizerSettings


def optimizer_for(training: TrainingSection, model: nn.Module) -> torch.optim.Optimizer:
    """Over what requires gradients."""
    settings = OptimizerSettings(
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        betas=(training.adam_beta1, training.adam_beta2),
        epsilon=training.adam_epsilon,
        loraplus_lr_ratio=training.loraplus_lr_ratio,
        loraplus_lr_embedding=training.loraplus_lr_embedding,
        rules=[GroupRule(**rule.model_dump()) for rule in training.parameter_groups],
    )
    return build_optimizer(model, settings, training.optim)


def _warmup_of(training: TrainingSection, total_steps: int) -> int:
    """The steps in which the learning rate rises."""
    return training.warmup_steps or round(training.warmup_ratio * total_steps)


def remarks(training: TrainingSection, total_steps: int) -> list[str]:
    """Where the config's numbers cannot be kept in a run of so many steps: what it comes to instead."""
    warmup, decay = _warmup_of(training, total_steps), round(training.lr_decay_ratio * total_steps)
    found, last = [], f"the run's {total_steps:,} step{'s' if total_steps > 1 else ''}"
    if warmup >= total_steps:
        reached = training.learning_rate * total_steps / (warmup + 1)
        found.append(
            f"the warm-up of {warmup:,} steps is not over within {last}: the learning rate rises to {reached:.3g} and "
            f"never reaches {training.learning_rate:g}; lower training.warmup_steps"
        )
    elif training.lr_scheduler_type == "warmup_stable_decay" and warmup + decay > total_steps:
        found.append(
            f"a warm-up of {warmup:,} steps and a decay of {decay:,} are more than {last}: the decay takes the "
            f"{total_steps - warmup:,} that are left; lower training.lr_decay_ratio or the warm-up"
        )
    elif training.lr_scheduler_type == "warmup_stable_decay" and decay == 0:
        found.append(f"the decay is no step long: training.lr_decay_ratio is {training.lr_decay_ratio:g} of {last}")
    if training.eval_steps is not None and training.eval_steps > total_steps:
        found.append(
            f"there is no evaluation between: training.eval_steps is {training.eval_steps:,}, more than {last}"
        )
    return found


def schedule_for(
    training: TrainingSection, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Of the learning rate, over a run of `total_steps`."""
    return build_schedule(
        optimizer,
        training.lr_scheduler_type,
        warmup_steps=_warmup_of(training, total_steps),
        total_steps=total_steps,
        min_lr_ratio=training.min_lr_ratio,
        decay_steps=round(training.lr_decay_ratio * total_steps),
    )
