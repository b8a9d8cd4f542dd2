"""The loop: batches in, optimiser steps out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lowrank.attention import segments
from lowrank.data import BatchPlan
from lowrank.errors import JobError
from lowrank.training.callbacks import Callback, Run, StepMetrics
from lowrank.training.loss import Loss
from lowrank.training.memory import peak_bytes
from lowrank.training.steps import Group, groups


def fit(
    run: Run,
    plan: BatchPlan,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    accelerator: Accelerator,
    accumulation: int = 1,
    max_grad_norm: float = 1.0,
    penalty: Callable[[], torch.Tensor] | None = None,
) -> None:
    """Trains `run.model` from where the run stands until `run.total_steps` are done or `run.stop` is set.

    The loss of a step is the sum over its supervised tokens divided by their number, over all accumulated batches at
    once: how a step's tokens are split into batches does not change it. accelerate's own accumulation would average
    over batches, so it is not used.

    Args:
        run: Model and position; its callbacks are told of every step.
        plan: The order of the batches.
        loss: Sums over a batch's supervised tokens.
        optimizer: Over the trainable parameters.
        schedule: Of its learning rate, stepped once an optimiser step.
        accelerator: Runs the backward pass.
        accumulation: Batches in an optimiser step.
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them as they are.
        penalty: Added to the loss of each step once (AdaLoRA's orthogonality).

    Raises:
        JobError: the loss or a gradient is not finite; the step was not taken.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device
    upcoming = groups(plan, accumulation, run.position)
    run.model.train()
    while run.step < run.total_steps and not run.stop:
        began = time.perf_counter()
        group = next(upcoming).to(device)
        fetched = time.perf_counter()
        total = _gradients(run.model, loss, group, accelerator, penalty)
        norm = _clip(parameters, max_grad_norm)
        value, norm_value = torch.stack([total, norm.to(total.dtype)]).tolist()  # where the host waits for the device
        _check_finite(run, value, norm_value)
        learning_rate = float(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        run.step, run.position = run.step + 1, group.after
        run.tell(Callback.on_gradients)
        optimizer.zero_grad(set_to_none=True)
        metrics = StepMetrics(
            step=run.step,
            epoch=group.epochs,
            loss=value,
            learning_rate=learning_rate,
            grad_norm=norm_value,
            tokens=group.tokens,
            supervised=group.supervised,
            seconds=time.perf_counter() - began,
            data_seconds=fetched - began,
            peak_bytes=peak_bytes(device),
        )
        run.tell(Callback.on_step_end, metrics)


def _gradients(
    model: Any, loss: Loss, group: Group, accelerator: Accelerator, penalty: Callable[[], torch.Tensor] | None
) -> torch.Tensor:
    """The gradients of one optimiser step; returns its loss, the penalty left out."""
    parts = []
    for batch in group.batches:
        with segments(model, batch.segments):
            part = loss(model, batch) / group.supervised
            accelerator.backward(part)
        parts.append(part.detach())
    if penalty is not None:
        accelerator.backward(penalty())
    return torch.stack(parts).sum()


def _clip(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales the gradients down to `max_norm`, and returns the norm that they had."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


def _check_finite(run: Run, loss: float, norm: float) -> None:
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise JobError(
            f"step {run.step + 1}: the loss is {loss} and the norm of the gradients {norm}",
            fix="Lower training.learning_rate, or look at the data with `lowrank preview`.",
        )
