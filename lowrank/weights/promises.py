"""What an update has to do to a parameter's products with a vector, worked out without the merged weight.

W' = gain · (W + s·B·A) gives W'x = gain · (Wx + s·B·(Ax)): two thin products. The scale is taken from the config and
the rank of the tensors themselves, and the experts' rows are picked one by one: nothing is shared with what merges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from lowrank.adapters.config import AdaLoraConfig
from lowrank.adapters.targets import pattern_value
from lowrank.weights.updates import (
    ExpertsUpdate,
    LowRankUpdate,
    Replacement,
    Resized,
    RowReplacement,
    Shift,
    Update,
)


@dataclass(frozen=True, slots=True)
class Promise:
    """Products that a block of rows shall have with a vector.

    Attributes:
        products: (rows,), before a gain.
        terms: Gives (rows,), the size of the terms that were summed, which the sum's rounding goes with.
    """

    products: Tensor
    terms: Callable[[], Tensor]


@singledispatch
def promised(update: Update, products: Tensor, x: Tensor, first: int, low: Tensor | None) -> Promise:
    """What becomes of `products`, those of some rows of the base with x.

    Args:
        update: The update.
        products: (rows,).
        x: The vector, as long as the rows.
        first: The first of the rows (of the columns, for a parameter that is stored transposed).
        low: What `thin` gives for x.
    """
    raise NotImplementedError(f"a {type(update).__name__} needs its promise in lowrank.weights.promises")


@singledispatch
def thin(update: Update, x: Tensor) -> Tensor | None:
    """The factors' product with x, which all rows share."""
    return None


@thin.register
def _(update: LowRankUpdate, x: Tensor) -> Tensor:
    return _first_factor(update).to(x.dtype) @ x


@thin.register
def _(update: ExpertsUpdate, x: Tensor) -> Tensor:
    return update.load()[1].to(x.dtype) @ x


@promised.register
def _(update: LowRankUpdate, products: Tensor, x: Tensor, first: int, low: Tensor | None) -> Promise:
    A, B = _first_factor(update).to(x.dtype), update.load()["lora_B"].to(x.dtype)
    if update.transposed:
        low = A[:, first : first + len(x)] @ x
    else:
        B = B[first : first + len(products)]
    assert low is not None
    scale, size = _scale(update, len(A)), low
    hoped = torch.addmv(products, B, low, alpha=scale)
    return Promise(hoped, lambda: torch.linalg.vector_norm(B, dim=1) * (torch.linalg.vector_norm(size) * abs(scale)))


@promised.register
def _(update: ExpertsUpdate, products: Tensor, x: Tensor, first: int, low: Tensor | None) -> Promise:
    assert low is not None
    left, rows = update.load()[0], torch.arange(first, first + len(products))
    expert = rows // left.shape[1] if update.expert is None else torch.full_like(rows, update.expert)
    of_rows = left[expert, rows - expert * left.shape[1] if update.expert is None else rows].to(x.dtype)
    each = of_rows * low[expert] * update.scale
    return Promise(products + each.sum(1), lambda: each.abs().sum(1))


@promised.register
def _(update: Replacement, products: Tensor, x: Tensor, first: int, low: Tensor | None) -> Promise:
    rows = update.rows(first, first + len(products)).to(x.dtype)
    hoped = rows.reshape(len(products), -1) @ x
    return Promise(hoped, hoped.abs)


@promised.register
def _(update: Resized, products: Tensor, x: Tensor, first: int, low: Tensor | None) -> Promise:
    hoped = products.clone()
    new = torch.arange(first, first + len(products)) >= update.stored
    if bool(new.any()):
        hoped[new] = update.fill().to(x.dtype).reshape(-1) @ x
    return Promise(hoped, hoped.abs)


@promised.register
def _(update: RowReplacement, products: Tensor, x: Tensor, first: int, low: Tensor | None) -> Promise:
    hoped = products.clone()
    for row, values in zip(update.rows.tolist(), update.values, strict=True):
        if first <= row < first + len(products):
            hoped[row - first] = values.to(x.dtype) @ x
    return Promise(hoped, hoped.abs)


@promised.register
def _(update: Shift, products: Tensor, x: Tensor, first: int, low: Tensor | None) -> Promise:
    added = update.scale * update.load().to(x.dtype)[first : first + len(products)] * x
    return Promise(products + added, added.abs)


def magnitudes(update: LowRankUpdate, first: int, count: int) -> Tensor:
    """The norms that the rows of W' shall have (DoRA)."""
    all_of_them = update.load()["lora_magnitude_vector"]
    return all_of_them if update.transposed else all_of_them[first : first + count]


def _first_factor(update: LowRankUpdate) -> Tensor:
    factors = update.load()
    return factors["lora_A"] * factors["lora_E"] if "lora_E" in factors else factors["lora_A"]


def _scale(update: LowRankUpdate, rank: int) -> float:
    config = update.config
    if isinstance(config, AdaLoraConfig):
        return config.lora_alpha / (config.init_r + 1e-5)
    alpha = pattern_value(config.alpha_pattern, update.path, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
