"""A model with an adapter that does something, and the gradients of its factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lowrank


def adapted(model: Any, **config: Any) -> Any:
    """With LoRA of rank 2, whose B is drawn too."""
    lowrank.wrap(model, lowrank.LoraConfig(r=2, **config))
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter)
    return model


def adapter_gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """By the parameters' names, of the loss of all tokens; the model has none afterwards."""
    model(ids, labels=ids, use_cache=False).loss.backward()
    found = {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
