"""What layers keep for the backward pass: what they cannot make again cheaply.

Norms, activations and gates are made again of their inputs, which are kept; so whoever multiplies what they give need
not keep it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowrank.ops.made_again import can_be_made, made_again
from lowrank.training.transforms.activations import is_activation, lean_activation
from lowrank.training.transforms.gates import gate_of
from lowrank.training.transforms.own_forward import has_own_forward


def keep_less(model: Any) -> int:
    """Has each layer keep less; what it computes stays, bit for bit (by a kernel for gates, on a card, nearly so).

    Layers that are recomputed, compiled or sharded have no need of it, or cannot take it.

    Returns:
        How many layers do. None does where the model does not say which modules its layers are; those whose forward has
        been replaced stay as they are.
    """
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds and has_own_forward(module)]
    for layer in layers:
        forwards = [(module, _lean_forward(module)) for module in layer.modules() if has_own_forward(module)]
        for module, forward in forwards:
            if forward is not None:
                module.__dict__["forward"] = functools.partial(forward, module)
        layer.__dict__["forward"] = functools.partial(_lean, layer)
    return len(layers)


def _lean_forward(module: nn.Module) -> Callable[..., torch.Tensor] | None:
    """What computes, given the module, what it does, and can be made again; None where nothing does."""
    gate = gate_of(module)
    if gate is not None:
        return gate.forward
    if is_activation(module):
        return lean_activation
    return _layer_norm if type(module) is nn.LayerNorm else None


def _layer_norm(module: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    of = [x, *(each for each in (module.weight, module.bias) if each is not None)]
    return can_be_made(nn.LayerNorm.forward(module, x), lambda x, *_: nn.LayerNorm.forward(module, x), *of)


def _lean(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with made_again():
        return type(layer).forward(layer, *args, **kwargs)
