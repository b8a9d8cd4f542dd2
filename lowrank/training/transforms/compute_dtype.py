"""A model computes in more bits than its weights are held in.

Activations become wide behind each embedding. Adapted linear layers bring their weight to its input's dtype anyway, for
each product; the others do here, and those that are adapted where no adapter acts. What has one dimension (norms,
biases) is widened where it lies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.install import hosts
from lowrank.adapters.kinds.embedding import scaled_rows
from lowrank.adapters.kinds.forwards import acts_as, tokens_in
from lowrank.adapters.kinds.wide import make_wide
from lowrank.adapters.methods.layer import LowRankLayer
from lowrank.ops.wide_linear import wide_linear
from lowrank.quantisers.registry import quantiser_of


def why_not_wide(model: PreTrainedModel) -> str | None:
    """What keeps a model, adapters in, from computing in more bits than its weights have; None where nothing does."""
    adapted = {module: list(adapters.layers().values()) for _, module, adapters in hosts(model)}
    for path, module in model.named_modules():
        if hasattr(module, "_old_forward"):
            return f"accelerate moves what {path or type(module).__name__} computes with from device to device"
        if not all(isinstance(layer, LowRankLayer) for layer in adapted.get(module, [])):
            return f"{path} trains as a whole, or in other ways than by factors"
        quantiser = quantiser_of(module)
        if quantiser is not None:
            if quantiser.product(module) is None or module not in adapted:
                return f"{path} computes as {quantiser.name} has it"
        elif isinstance(module, nn.Embedding):
            if (
                module in adapted
                or module.max_norm is not None
                or not acts_as(module, nn.Embedding.forward, tokens_in, scaled_rows)
            ):
                return f"{path} looks its rows up in a way of its own"
        elif type(module) not in (nn.Linear, Conv1D):
            held: dict[str, nn.Parameter] = dict(module.named_parameters(recurse=False))
            rigid = [name for name, each in held.items() if each.dim() > 1 and each.dtype == model.dtype]
            if rigid and not isinstance(module, LowRankLayer):
                return f"{path}.{rigid[0]}, of a {type(module).__name__}, is multiplied in its own dtype"
    return None


def compute_wide(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Has a model compute in `dtype`; `why_not_wide` must have found nothing. Matrices stay in their dtype."""
    adapted = {module for _, module, _ in hosts(model)}
    for module in list(model.modules()):
        product = _PRODUCTS.get(type(module))
        own = None if product is None else functools.partial(product, module)
        if module in adapted:
            make_wide(module, dtype, own)
        elif isinstance(module, nn.Embedding):
            module.__dict__["forward"] = functools.partial(_embedding, module, dtype)
        elif own is not None:
            module.__dict__["forward"] = own
        for parameter in module.parameters(recurse=False) if quantiser_of(module) is None else ():
            if parameter.dim() < 2 and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    return wide_linear(x, module.weight, module.bias)


def _conv1d(module: Any, x: torch.Tensor) -> torch.Tensor:
    return wide_linear(x, module.weight.t(), module.bias)


_PRODUCTS: dict[type[nn.Module], Callable[[Any, torch.Tensor], torch.Tensor]] = {nn.Linear: _linear, Conv1D: _conv1d}


def _embedding(module: Any, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    """Widened before it is scaled."""
    rows = F.embedding(ids, module.weight, module.padding_idx).to(dtype)
    scale = getattr(module, "embed_scale", None)
    return rows if scale is None else rows * scale
