"""Gradient checkpointing computes a layer again in the backward pass: with the adapters that acted in the forward pass.

`torch.utils.checkpoint` offers no place for that which would serve all who call it (transformers, accelerate, a user's
own loop), so its two kinds are taught here, at the one point where each is given the function that it will run again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.utils.checkpoint as torch_checkpoint

from lowrank.adapters.activity import pinned


@functools.cache
def pin_recomputation() -> None:
    """Has every checkpoint of this process keep what acts when it is made."""
    reentrant, frame = torch_checkpoint.CheckpointFunction, torch_checkpoint._CheckpointFrame
    forward, create = reentrant.forward, frame.__init__

    @functools.wraps(forward)
    def pinned_forward(ctx: Any, run_function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        return forward(ctx, pinned(run_function), preserve_rng_state, *args)

    @functools.wraps(create)
    def pinned_create(self: Any, recompute_fn: Any, *args: Any, **kwargs: Any) -> None:
        create(self, pinned(recompute_fn), *args, **kwargs)

    reentrant.forward = staticmethod(pinned_forward)
    frame.__init__ = pinned_create
