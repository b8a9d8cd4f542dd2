"""Whether a subclass's own forward computes what its kind of layer computes, tried on an example.

A subclass of `torch.nn.Linear` may be a linear layer that casts its input, or a router that returns its best experts.
An adapter adds s·B·A·x to what a linear layer gives; beside anything else it would be wrong or crash.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lowrank.adapters.kinds.kind import HostModule

Compute = Callable[[Any, torch.Tensor], torch.Tensor]

_tried: WeakKeyDictionary[nn.Module, tuple[object, bool]] = WeakKeyDictionary()
_LARGE = 300.0  # beyond where a forward that clips would clip


def acts_as(
    module: HostModule, plain: Callable[..., Any], example: Callable[[Any], torch.Tensor], want: Compute
) -> bool:
    """Whether a module's class computes the same as the plain layer.

    Args:
        module: An instance of a subclass of the plain layer's class.
        plain: The plain layer's forward: a class that has this one is not tried.
        example: Gives an input for the module.
        want: What the output for it must be.
    """
    forward = type(module).forward
    if forward is plain:
        return True
    known = _tried.get(module)
    if known is None or known[0] is not forward:
        known = _tried[module] = (forward, _try(_on_hand(module), forward, example, want))
    return known[1]


def features_in(module: HostModule) -> torch.Tensor:
    """Two rows of three vectors for a linear layer, the second row large: (2, 3, in)."""
    count = module.in_features if hasattr(module, "in_features") else module.weight.shape[0]
    x = torch.arange(6 * count, dtype=torch.float32).sin().view(2, 3, count)
    x[1] *= _LARGE
    return x.to(module.weight.device, module.weight.dtype)


def channels_in(module: HostModule) -> torch.Tensor:
    """Two signals for a convolution, the second large: (2, channels, length ...)."""
    reach = [dilation * (size - 1) + 3 for size, dilation in zip(module.kernel_size, module.dilation, strict=True)]
    shape = (2, module.in_channels, *reach)
    x = torch.arange(math.prod(shape), dtype=torch.float32).sin().view(shape)
    x[1] *= _LARGE
    return x.to(module.weight.device, module.weight.dtype)


def tokens_in(module: HostModule) -> torch.Tensor:
    """A few tokens of an embedding's table, (1, 4)."""
    last = module.num_embeddings - 1
    return torch.tensor([[0, last // 2, last // 3, last]], device=module.weight.device)


@torch.no_grad()
def _try(
    module: HostModule, forward: Callable[..., Any], example: Callable[[Any], torch.Tensor], want: Compute
) -> bool:
    try:
        x = example(module)
        got, wanted = forward(module, x.clone()), want(module, x)
    except Exception:  # whatever it raises: it does not take what the plain layer takes
        return False
    if not isinstance(got, torch.Tensor) or got.shape != wanted.shape:
        return False
    got, wanted = got.double(), wanted.double()
    allowed = 1e-4 if module.weight.dtype in (torch.float32, torch.float64) else 2e-2
    return all(
        bool((one - other).abs().max() <= allowed * other.abs().max() + 1e-9)
        for one, other in zip(got, wanted, strict=True)
    )


def _on_hand(module: HostModule) -> HostModule:
    """The module; where its tensors are on `meta`, a twin of it with numbers of its own."""
    held = {**module._parameters, **module._buffers}
    if not any(tensor is not None and tensor.is_meta for tensor in held.values()):
        return module
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        tensors = {
            name: tensor if tensor is None else _numbers(tensor) for name, tensor in getattr(module, kind).items()
        }
        twin.__dict__[kind] = tensors
    return twin


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_meta:
        return tensor
    first = torch.linspace(0.5, 1.5, tensor.shape[0] if tensor.ndim else 1).to(tensor.dtype)
    return first.view(-1, *[1] * (tensor.ndim - 1)).expand(tensor.shape) if tensor.ndim else first[0]
