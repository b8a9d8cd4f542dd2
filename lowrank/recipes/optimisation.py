"""Optimiser and schedule, as a config's training section names them."""

from __future__ import annotations

import torch
from torch import nn

from lowrank.config.sections import TrainingSection
from lowrank.training.optim import GroupRule, Settings, build_optimizer
from lowrank.training.schedule import build_schedule


def optimizer_for(training: TrainingSection, model: nn.Module) -> torch.optim.Optimizer:
    """Over what requires gradients."""
    settings = Settings(
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        betas=(training.adam_beta1, training.adam_beta2),
        epsilon=training.adam_epsilon,
        loraplus_lr_ratio=training.loraplus_lr_ratio,
        loraplus_lr_embedding=training.loraplus_lr_embedding,
        rules=[GroupRule(**rule.model_dump()) for rule in training.parameter_groups],
    )
    return build_optimizer(model, settings, training.optim)


def schedule_for(
    training: TrainingSection, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Of the learning rate, over a run of `total_steps`."""
    warmup = training.warmup_steps or round(training.warmup_ratio * total_steps)
    return build_schedule(
        optimizer,
        training.lr_scheduler_type,
        warmup_steps=warmup,
        total_steps=total_steps,
        min_lr_ratio=training.min_lr_ratio,
        decay_steps=round(training.lr_decay_ratio * total_steps),
    )
