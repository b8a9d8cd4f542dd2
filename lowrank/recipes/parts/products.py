"""In which dtype a run's products are computed: what the config asks for, or what is fastest here and loses nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lowrank.config import RunConfig, load_config
from lowrank.config.loading import CONFIG
from lowrank.errors import InputError
from lowrank.training.machine.product_rates import shapes_of, times_as_fast
from lowrank.training.transforms.compute_dtype import compute_wide, why_not_wide

WORTH = 1.2
"""Times as fast; below, bringing weights to another dtype costs what it saves."""


@dataclass(frozen=True)
class Products:
    """A choice.

    Attributes:
        dtype: Of the products.
        why: The reason, in words.
        open: Whether another machine could have chosen another.
    """

    dtype: torch.dtype
    why: str
    open: bool = False

    def __str__(self) -> str:
        return f"{_name(self.dtype)}{self.why}"


def choose_products(asked: str, model: PreTrainedModel, own: torch.dtype, rigid: str | None) -> Products:
    """What a model computes in; where that is wider than its weights it does so from here on.

    Args:
        asked: By the config; `auto` leaves it to the machine.
        model: Adapters in.
        own: What its base was loaded in.
        rigid: What of the run needs products in the weights' dtype; None for nothing.

    Raises:
        InputError: the config asks for a dtype that the model cannot compute in.
    """
    if asked == "auto":
        chosen = _fastest(model, own, rigid)
    else:
        chosen = Products(getattr(torch, asked), "")
        _refuse_what_cannot_be(chosen.dtype, model, own, rigid)
    if chosen.dtype == torch.float32 and model.dtype != torch.float32:
        compute_wide(model, torch.float32)
    return chosen


def _fastest(model: PreTrainedModel, own: torch.dtype, rigid: str | None) -> Products:
    if own not in (torch.bfloat16, torch.float16):
        return Products(own, ", as the weights")
    if model.device.type != "cpu":
        return Products(own, ", as the weights were loaded", open=True)
    times = times_as_fast(torch.float32, own, shapes_of(model))
    if times < WORTH:
        told = f"products are {1 / times:.1f} times as fast here as in float32"
        return Products(own, f", as the weights were loaded: {told}", open=True)
    told = f"products are {times:.1f} times as fast here as in {_name(own)}"
    reason = _why_not(model, rigid)
    if reason is None:
        return Products(torch.float32, f": {told}", open=True)
    return Products(own, f", as the weights were loaded; in float32 {told}, but {reason}", open=True)


def _refuse_what_cannot_be(asked: torch.dtype, model: PreTrainedModel, own: torch.dtype, rigid: str | None) -> None:
    reason = None
    if asked == torch.float32 and own != asked:
        reason = _why_not(model, rigid)
    elif asked != own and own != torch.float32:
        reason = f"its weights are in {_name(own)}, of which {_name(asked)} does not hold all values"
    if reason is not None:
        raise InputError(
            f"{type(model).__name__} cannot compute in {_name(asked)}: {reason}",
            where="model.compute_dtype",
            fix="Leave it out, or set model.dtype as well.",
        )


def _why_not(model: PreTrainedModel, rigid: str | None) -> str | None:
    """What keeps float32 products from a model; nothing does where its weights are in float32 to be trained."""
    return None if model.dtype == torch.float32 else rigid or why_not_wide(model)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def begun_in(config: RunConfig, resumed: Path | None) -> RunConfig:
    """The config; where it leaves the dtype of products to the machine, with the one that the run in a folder began
    with."""
    if resumed is None or config.compute_dtype != "auto" or not os.path.isfile(resumed / CONFIG):
        return config
    return _with(config, load_config(resumed / CONFIG).model.compute_dtype)


def computing_in(config: RunConfig, products: Products) -> RunConfig:
    """The config with the dtype that was chosen, where another machine could have chosen another."""
    return _with(config, _name(products.dtype)) if products.open else config


def _with(config: RunConfig, compute_dtype: str) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"compute_dtype": compute_dtype})})
