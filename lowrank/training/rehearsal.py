"""The longest batch first: a run that will not fit fails before it has begun."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from lowrank.attention import segments
from lowrank.data import BatchPlan, BatchStream
from lowrank.training.loss import Loss
from lowrank.training.snapshot import random_state, set_random_state


def rehearse(model: Any, plan: BatchPlan | BatchStream, loss: Loss, accelerator: Accelerator) -> None:
    """One forward and backward pass over the longest training batch; the gradients are dropped, and the random state is
    what it was."""
    before = random_state()
    was_training = model.training
    model.train()
    batch = plan.largest().to(model.get_input_embeddings().weight.device)
    with segments(model, batch.segments):
        accelerator.backward(loss(model, batch) / batch.supervised)
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    set_random_state(before)


@torch.no_grad()
def rehearse_evaluation(model: Any, plan: BatchPlan, loss: Loss) -> None:
    """One forward pass over the longest evaluation batch."""
    was_training = model.training
    model.eval()
    batch = plan.largest().to(model.get_input_embeddings().weight.device)
    with segments(model, batch.segments):
        loss(model, batch)
    model.train(was_training)
