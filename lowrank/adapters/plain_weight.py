"""Whether a module's weight is the plain matrix that its class says: an adapter is trained on it and added to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lowrank.adapters.dense_base import is_quantised
from lowrank.adapters.kinds.kind import HostModule, is_multihead
from lowrank.errors import InputError
from lowrank.quantisers.registry import offers

_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_plain(path: str, module: HostModule) -> None:
    """Raises InputError for a layer that is quantised, as its weight shows, in a way that is not known here."""
    if is_quantised(module) or is_multihead(module):
        return
    weight = getattr(module, "weight", None)
    why = _obstacle(module, weight) if isinstance(weight, torch.Tensor) else "it has no weight of its own"
    if why is not None:
        raise InputError(
            f"{path} ({type(module).__name__}) is no plain layer, and no adapter fits it: {why}", fix=_fix()
        )


def check_none_hidden(modules: Mapping[str, nn.Module]) -> None:
    """Raises InputError for a linear layer that is none of torch's, since what stands for its weight is not one matrix.

    "all-linear" would pass it by, and adapt what little is left.
    """
    for path, module in modules.items():
        sized = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
        held = (*module._parameters.values(), *module._buffers.values())
        coded = any(t is not None and t.ndim > 1 and t.dtype not in _PLAIN for t in held)
        if sized and coded and not is_quantised(module):
            raise InputError(
                f"{path} is a {type(module).__name__}, whose weight is stored in codes: no adapter fits it",
                fix=_fix(),
            )


def has_other_codes(module: nn.Module) -> bool:
    """Whether a parameter in it stands for other numbers than it holds."""
    return any(_code(p) is not None for p in module.parameters())


def _fix() -> str:
    return f"Load the base dense, or quantised {offers()}."


def _obstacle(module: HostModule, weight: torch.Tensor) -> str | None:
    if (code := _code(weight)) is not None:
        return f"its weight is stored as {code}"
    if isinstance(module, nn.Linear) and weight.shape != (module.out_features, module.in_features):
        return f"its weight is {tuple(weight.shape)}, and its sizes are {module.out_features} and {module.in_features}"
    return None


def _code(tensor: torch.Tensor) -> str | None:
    if tensor.dtype not in _PLAIN:
        return str(tensor.dtype)
    return None if type(tensor).dequantize is torch.Tensor.dequantize else type(tensor).__name__
