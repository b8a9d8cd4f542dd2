"""Gradient checkpointing (Chen 2016): activations are computed again in the backward pass, layer by layer."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from lowrank.errors import InputError
from lowrank.training.transforms.recompute_modes import RecomputeMode
from lowrank.training.transforms.selective import selective_contexts


def recompute_activations(model: Any, mode: Literal[True] | RecomputeMode) -> None:
    """Keeps each layer's input alone; with "selective" what its products and its attention give as well, with "offload"
    the input in the host's memory, pinned, instead of the accelerator's.

    Raises:
        InputError: the model does not support it, or there is no accelerator to offload from.
    """
    if not model.supports_gradient_checkpointing:
        raise InputError(
            f"{type(model).__name__} does not support gradient checkpointing", where="training.gradient_checkpointing"
        )
    exact: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        exact |= {"context_fn": selective_contexts, "early_stop": False}
    enable = getattr(model, "activation_checkpointing_enable", None)  # transformers' name since 5.20
    if mode == "offload":
        if model.device.type == "cpu":
            raise InputError(
                "the model is in the host's memory already: there is nothing to offload",
                where="training.gradient_checkpointing",
                fix="Set it to true.",
            )
        if enable is None or "offload" not in inspect.signature(enable).parameters:
            raise InputError(
                "this version of transformers cannot offload activations",
                where="training.gradient_checkpointing",
                fix="Upgrade transformers, or set it to true.",
            )
        enable(exact, offload=True)
    elif enable is not None:
        enable(exact)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=exact)
