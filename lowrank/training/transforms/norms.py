"""The model's RMS norms through one autograd function each, where it says what they say.

transformers has dozens of classes for them. They differ in where they round, and in whether a weight stands for itself
or for its distance from one; which of these a class does is found out on a copy of the module at hand, on the CPU. A
card's kernels sum in another order, after which a number may be rounded to its other neighbour.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowrank.ops.rms_norm import rms_norm
from lowrank.training.transforms.own_forward import has_own_forward

_NAMES_OF_EPS = "variance_epsilon", "eps", "epsilon"
_ROWS = 64
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def lean_norms(model: nn.Module) -> int:
    """Puts the function in.

    Returns:
        How many modules compute with it now. Left as they were are norms of another kind, norms without a weight, those
        whose forward has been replaced already, and norms under accelerate's hooks.
    """
    found: dict[tuple[Any, ...], Callable[..., torch.Tensor] | None] = {}
    count = 0
    for module in model.modules():
        eps = _eps(module)
        if eps is None or not _eligible(module):
            continue
        kind = type(module), module.weight.dtype, eps
        if kind not in found:
            found[kind] = _same(module, eps)
        forward = found[kind]
        if forward is not None:
            module.__dict__["forward"] = functools.partial(forward, module, eps)
            count += 1
    return count


def _eligible(module: Any) -> bool:
    if "Norm" not in type(module).__name__ or not has_own_forward(module):
        return False
    own = dict(module.named_parameters())
    one_weight = set(own) == {"weight"} and own["weight"].dim() == 1 and not list(module.buffers())
    return one_weight and len(inspect.signature(module.forward).parameters) == 1


def _eps(module: nn.Module) -> float | None:
    found = (getattr(module, name, None) for name in _NAMES_OF_EPS)
    return next((eps for eps in found if isinstance(eps, float)), None)


def _llama(module: Any, eps: float, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, module.weight, eps, rounded_first=True)


def _olmo(module: Any, eps: float, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, module.weight.float(), eps, rounded_first=False)


def _gemma(module: Any, eps: float, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, module.weight, eps, rounded_first=False, one_plus=True)


@torch.no_grad()
def _same(module: Any, eps: float) -> Callable[..., torch.Tensor] | None:
    """What computes what the module does, up to how sums are rounded; None where nothing does."""
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module).cpu()
    twin.weight.copy_(torch.randn(weight.shape, generator=generator))
    x = torch.randn(_ROWS, len(weight), generator=generator).to(weight.dtype)
    expected = twin(x)
    errors = {forward: _error(forward(twin, eps, x), expected) for forward in (_llama, _olmo, _gemma)}
    best = min(errors, key=lambda forward: errors[forward])
    return best if errors[best] <= _TOLERANCE.get(weight.dtype, 1e-12) else None


def _error(got: torch.Tensor, expected: Any) -> float:
    """The largest, as a part of the number it is in."""
    if not isinstance(expected, torch.Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    return float(((got - expected).abs() / expected.abs().clamp(min=torch.finfo(got.dtype).tiny)).max())
