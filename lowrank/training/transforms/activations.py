"""The activations that models are built with: each number by itself, without parameters and without chance."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2CLS, GELUTanh, SiLUActivation

from lowrank.ops.gated import Activation, activated
from lowrank.training.transforms.own_forward import has_own_forward


def is_activation(module: Any) -> bool:
    """Whether it is one of them, run by its class's own forward."""
    if type(module) not in _classes() or not has_own_forward(module):
        return False
    return not (getattr(module, "inplace", False) or list(module.parameters()) or list(module.buffers()))


def lean_activation(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What it computes; x alone is kept."""
    return activated(x, function_of(module))


def function_of(module: nn.Module) -> Activation:
    """What an activation computes, as plain operations."""
    return functools.partial(type(module).forward, module)


def kernel_of(module: nn.Module) -> str | None:
    """What `ops.kernels` calls what an activation computes, in torch's own function; None for all others."""
    if type(module) in (nn.SiLU, SiLUActivation):
        return "silu"
    said = module.act if type(module) is GELUTanh else None
    tanh = isinstance(said, functools.partial) and (said.func, said.keywords) == (F.gelu, {"approximate": "tanh"})
    return "gelu_tanh" if tanh or (type(module) is nn.GELU and module.approximate == "tanh") else None


@functools.cache
def _classes() -> frozenset[type[nn.Module]]:
    """Those that transformers makes of a config's `hidden_act`, without GLU, which halves, and RReLU, which draws."""
    classes = (value[0] if isinstance(value, tuple) else value for value in ACT2CLS.values())
    return frozenset(classes) - {nn.GLU, nn.RReLU}
