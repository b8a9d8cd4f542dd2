"""The longest batch first: a run that will not fit fails before it has begun."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from lowrank.attention import segments
from lowrank.data.batches.order import Batches
from lowrank.training.checkpoints.snapshot import random_state, set_random_state
from lowrank.training.diagnosis import first_not_finite, refuse_broken_weights
from lowrank.training.losses.supervised import Loss
from lowrank.training.reach import refuse_unreached, unreached
from lowrank.training.steps import means_of, minimised


def rehearse(model: Any, plan: Batches, loss: Loss, accelerator: Accelerator, base: str = "the base") -> str | None:
    """One forward and backward pass over the longest training batch; the gradients are dropped, and the random state is
    what it was.

    Returns:
        Where its loss is not finite: what was looked at, in a sentence.

    Raises:
        InputError: it is not, because weights of the base, whose name is `base`, are not; or tensors of an adapter get
            no gradient. One that a pass in training skips by chance (a dropped layer) is tried again without chance.
    """
    before = random_state()
    was_training = model.training
    batch = plan.largest().to(model.get_input_embeddings().weight.device)
    try:
        model.train()
        with segments(model, batch.segments, batch.parents, batch.padded):
            value = _backward(model, batch, loss, accelerator)
            remark = None if torch.isfinite(value) else _why(model, base, float(value), lambda: loss(model, batch))
        if unreached(model):
            model.eval()
            with segments(model, batch.segments, batch.parents, batch.padded):
                _backward(model, batch, loss, accelerator)
        missed = unreached(model)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        set_random_state(before)
    refuse_unreached(missed)
    return remark


def _backward(model: Any, batch: Any, loss: Loss, accelerator: Accelerator) -> torch.Tensor:
    value = minimised(means_of(loss(model, batch), batch.counts), batch.counts)
    if value.requires_grad:
        accelerator.backward(value)
    return value.detach()


def _why(model: Any, base: str, value: float, forward: Callable[[], object]) -> str:
    refuse_broken_weights(model, base)
    first = first_not_finite(model, forward)
    found = "no module's output" if first is None else f"the first module whose output is not is {first}"
    return f"the loss of the longest batch is {value}: all weights are finite, {found}; such steps are not taken"


@torch.no_grad()
def rehearse_evaluation(model: Any, plan: Batches, loss: Loss) -> None:
    """One forward pass over the longest evaluation batch."""
    was_training = model.training
    model.eval()
    batch = plan.largest().to(model.get_input_embeddings().weight.device)
    with segments(model, batch.segments, batch.parents, batch.padded):
        loss(model, batch)
    model.train(was_training)
