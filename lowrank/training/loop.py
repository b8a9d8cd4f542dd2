"""The loop: batches in, optimiser steps out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from lowrank.attention import segments
from lowrank.data.batches.order import Order
from lowrank.errors import JobError
from lowrank.training.losses.supervised import Loss
from lowrank.training.machine.memory import HeapKeeper, peak_bytes
from lowrank.training.machine.ranks import ALONE, Ranks
from lowrank.training.run import Callback, Run, StepMetrics
from lowrank.training.steps import ONE_BATCH, Group, StepSize, groups, means_of, minimised


def fit(
    run: Run,
    order: Order,
    loss: Loss,
    *,
    accelerator: Accelerator,
    ranks: Ranks = ALONE,
    size: StepSize = ONE_BATCH,
    max_grad_norm: float = 1.0,
    max_skips: int = 5,
    penalty: Callable[[], torch.Tensor] | None = None,
    prepare: Callable[[Group], None] | None = None,
) -> None:
    """Trains `run.model` from where the run stands until `run.total_steps` are done or `run.stop` is set.

    The loss of a step is the sum over its supervised tokens (or pairs) divided by their number, over all accumulated
    batches at once: how they are split into batches does not change it, as it would with accelerate's accumulation.

    A step whose loss or gradients are not finite is not taken: weights and optimiser stay, the data moves on.

    Args:
        run: Model, optimiser and position; its callbacks are told of every step.
        order: Of the batches.
        loss: Sums over a batch's supervised tokens.
        accelerator: Runs the backward pass.
        ranks: The processes that share each step's batches; all see the same losses and take the same steps.
        size: What goes into an optimiser step, over all processes.
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them as they are.
        max_skips: So many steps in a row may be skipped.
        penalty: Added to the loss of each step once (AdaLoRA's orthogonality).
        prepare: Told of a step's batches before any of them is learned from.

    Raises:
        JobError: more steps in a row than `max_skips` were not finite.
    """
    parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device
    upcoming = groups(order, size, run.position, ranks)
    heap, in_a_row = HeapKeeper(), 0
    run.model.train()
    while run.step < run.total_steps and not _agree_to_stop(run, ranks):
        began = time.perf_counter()
        group = next(upcoming).to(device)
        fetched = time.perf_counter()
        means = ranks.total(_gradients(run, loss, group, accelerator, penalty, prepare, ranks))
        ranks.add_up_gradients(parameters)
        step = take_step(run, means, group.counts, parameters, max_grad_norm)
        _agree_to_stop(run, ranks)
        run.step, run.position = run.step + 1, group.after
        if not step.taken:
            in_a_row += not step.lowered  # float16 overflows now and then until its scale is found
            run.tell(Callback.on_skip, step.loss, step.grad_norm)
            stop_when_lost(in_a_row, max_skips, run)
            continue
        in_a_row = 0
        run.tell(Callback.on_gradients)
        run.optimizer.zero_grad(set_to_none=True)
        heap.mend()
        run.tell(Callback.on_step_end, measured(step, run.step, group, began, fetched, device, loss.figures))
    run.interrupted = run.stop and ranks.any(run.interrupted)


def _agree_to_stop(run: Run, ranks: Ranks) -> bool:
    """Whether training ends here: a signal may have reached one process and not yet the others."""
    run.stop = ranks.any(run.stop or run.interrupted)
    return run.stop


def _gradients(
    run: Run,
    loss: Loss,
    group: Group,
    accelerator: Accelerator,
    penalty: Callable[[], torch.Tensor] | None,
    prepare: Callable[[Group], None] | None,
    ranks: Ranks,
) -> torch.Tensor:
    """This process's part of an optimiser step's gradients; returns its part of the means, the penalty left out."""
    if prepare is not None:
        prepare(group)
    parts = []
    for number, batch in enumerate(group.batches):
        counts = number < len(group.batches) - group.idle
        with segments(run.model, batch.segments, batch.parents, batch.padded):
            means = means_of(loss(run.model, batch), group.counts)
            part = minimised(means, group.counts)
            accelerator.backward(run.scaler.scale(part if counts else part * 0.0))
        parts.append(means.detach() if counts else torch.zeros_like(means))
    if penalty is not None:
        accelerator.backward(run.scaler.scale(penalty() / ranks.count))
    return torch.stack(parts).sum(0)


class Taken(NamedTuple):
    """What came of an optimiser step: `taken` unless loss or gradients were not finite, `lowered` with the scale."""

    loss: float
    grad_norm: float
    learning_rate: float
    taken: bool
    lowered: bool
    figures: list[float]


def take_step(
    run: Run,
    means: torch.Tensor,
    counts: Sequence[int],
    parameters: list[nn.Parameter],
    max_grad_norm: float,
) -> Taken:
    """Clips the gradients that are there and takes the step; they are dropped if they or the loss are not finite.

    Args:
        run: Its optimiser takes it.
        means: Of the step: what is minimised, and behind it figures, read with it, so that the host waits once.
        counts: Of the step.
        parameters: What has gradients.
        max_grad_norm: As in `fit`.
    """
    run.scaler.unscale_(run.optimizer)
    norm = _clip(parameters, max_grad_norm)
    read = torch.stack([minimised(means, counts), norm.to(means.dtype)])
    figures = means.reshape(-1)[len(counts) :]
    value, norm_value, *rest = torch.cat([read, figures]).tolist()  # where the host waits for the device
    finite = math.isfinite(value) and math.isfinite(norm_value)
    learning_rate = float(run.schedule.get_last_lr()[0])
    if finite:
        run.optimizer.step()
    else:
        run.optimizer.zero_grad(set_to_none=True)
        run.skipped += 1
    lowered = _rescale(run.scaler)
    run.schedule.step()
    return Taken(value, norm_value, learning_rate, finite, lowered, rest)


def measured(
    step: Taken,
    number: int,
    group: Group,
    began: float,
    fetched: float,
    device: torch.device,
    figures: Sequence[str] = (),
) -> StepMetrics:
    """A step that began, and had its data, at these times; `figures`: names of what else is known of it."""
    return StepMetrics(
        step=number,
        epoch=group.epochs,
        loss=step.loss,
        learning_rate=step.learning_rate,
        grad_norm=step.grad_norm,
        tokens=group.tokens,
        supervised=group.supervised,
        seconds=time.perf_counter() - began,
        data_seconds=fetched - began,
        peak_bytes=peak_bytes(device),
        figures=dict(zip(figures, step.figures, strict=True)),
    )


def _rescale(scaler: torch.amp.GradScaler) -> bool:
    """Moves float16's loss scale; whether it went down, and is still one that can."""
    if not scaler.is_enabled():
        return False
    scale = scaler._get_scale_async()  # get_scale waits for the device
    assert scale is not None, "a loss was scaled"
    before = scale.clone()
    scaler.update()
    after = scaler._get_scale_async()
    assert after is not None
    return bool(((after >= 1.0) & (after < before)).item())


def _clip(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales the gradients down to `max_norm`, and returns the norm that they had."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


def stop_when_lost(in_a_row: int, allowed: int, run: Run) -> None:
    """Raises JobError where more steps in a row than allowed were not taken."""
    if in_a_row > allowed:
        raise JobError(
            f"step {run.step}: {in_a_row} steps in a row had a loss or gradients that are not finite; none was taken",
            fix="Lower training.learning_rate, or look at the data with `lowrank preview`. Checkpoints, and what they "
            "hold, are from before.",
        )
