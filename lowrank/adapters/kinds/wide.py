"""Modules whose products are computed in more bits than their weights are held in: what they carry of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowrank.adapters.kinds.kind import HostModule

_OWN, _PRODUCTS = "wide_forward", "products_in"


def make_wide(module: HostModule, dtype: torch.dtype, own: Callable[..., Any] | None) -> None:
    """Notes on a module with adapters the dtype of its products, and what computes in its own forward's place."""
    module.__dict__[_PRODUCTS] = dtype
    if own is not None:
        module.__dict__[_OWN] = own


def products_in(module: HostModule, held: torch.dtype) -> torch.dtype:
    """The dtype of a module's products, whose weight is held in `held`."""
    return module.__dict__.get(_PRODUCTS, held)


def own_output(module: HostModule, *args: Any, **kwargs: Any) -> Any:
    """What a module gives without any adapter."""
    own = module.__dict__.get(_OWN)
    return type(module).forward(module, *args, **kwargs) if own is None else own(*args, **kwargs)
