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

from lowrank.adapters.config import AdaLoraConfig
from lowrank.adapters.targeting.targets import pattern_value
from lowrank.weights.merging.updates import (
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

    products: torch.Tensor
    terms: Callable[[], torch.Tensor]


@singledispatch
def promised(update: Update, weight: torch.Tensor, x: torch.Tensor, first: int, low: torch.Tensor | None) -> Promise:
    """What becomes of the products of some rows of the base with x.

    Args:
        update: The update.
        weight: The base's rows (rows, columns).
        x: The vector, as long as the rows.
        first: The first of the rows (of the columns, for a parameter that is stored transposed).
        low: What `thin` gives for x.
    """
    raise NotImplementedError(f"a {type(update).__name__} needs its promise in lowrank.weights.merging.promises")


@singledispatch
def thin(update: Update, x: torch.Tensor) -> torch.Tensor | None:
    """What the factors give for x and all rows, or the part of it that all rows share: worked out once a parameter."""
    return None


@thin.register
def _(update: LowRankUpdate, x: torch.Tensor) -> torch.Tensor:
    A, B = _first_factor(update).to(x.dtype), update.load()["lora_B"].to(x.dtype)
    return _scale(update, len(A)) * (B @ (A @ x))


@thin.register
def _(update: ExpertsUpdate, x: torch.Tensor) -> torch.Tensor:
    return update.load()[1].to(x.dtype) @ x


@promised.register
def _(update: LowRankUpdate, weight: torch.Tensor, x: torch.Tensor, first: int, low: torch.Tensor | None) -> Promise:
    columns, rows = slice(None), slice(first, first + len(weight))
    if update.transposed:
        columns, rows = slice(first, first + len(x)), slice(None)
        A, B = _first_factor(update)[:, columns].to(x.dtype), update.load()["lora_B"].to(x.dtype)
        hoped = torch.addmv(weight @ x, B, A @ x, alpha=_scale(update, len(A)))
    else:
        assert low is not None
        hoped = torch.addmv(low[rows], weight, x)

    def terms() -> torch.Tensor:
        A, B = _first_factor(update)[:, columns].to(x.dtype), update.load()["lora_B"][rows].to(x.dtype)
        return torch.linalg.vector_norm(B, dim=1) * (torch.linalg.vector_norm(A @ x) * abs(_scale(update, len(A))))

    return Promise(hoped, terms)


@promised.register
def _(update: ExpertsUpdate, weight: torch.Tensor, x: torch.Tensor, first: int, low: torch.Tensor | None) -> Promise:
    assert low is not None
    left, rows = update.load()[0], torch.arange(first, first + len(weight))
    expert = rows // left.shape[1] if update.expert is None else torch.full_like(rows, update.expert)
    of_rows = left[expert, rows - expert * left.shape[1] if update.expert is None else rows].to(x.dtype)
    each = of_rows * low[expert] * update.scale
    return Promise(weight @ x + each.sum(1), lambda: each.abs().sum(1))


@promised.register
def _(update: Replacement, weight: torch.Tensor, x: torch.Tensor, first: int, low: torch.Tensor | None) -> Promise:
    rows = update.rows(first, first + len(weight)).to(x.dtype)
    hoped = rows.reshape(len(weight), -1) @ x
    return Promise(hoped, hoped.abs)


@promised.register
def _(update: Resized, weight: torch.Tensor, x: torch.Tensor, first: int, low: torch.Tensor | None) -> Promise:
    hoped = weight @ x
    new = torch.arange(first, first + len(weight)) >= update.stored
    if bool(new.any()):
        hoped[new] = update.fill().to(x.dtype).reshape(-1) @ x
    return Promise(hoped, hoped.abs)


@promised.register
def _(update: RowReplacement, weight: torch.Tensor, x: torch.Tensor, first: int, low: torch.Tensor | None) -> Promise:
    hoped = weight @ x
    for row, values in zip(update.rows.tolist(), update.values, strict=True):
        if first <= row < first + len(weight):
            hoped[row - first] = values.to(x.dtype) @ x
    return Promise(hoped, hoped.abs)


@promised.register
def _(update: Shift, weight: torch.Tensor, x: torch.Tensor, first: int, low: torch.Tensor | None) -> Promise:
    added = update.scale * update.load().to(x.dtype)[first : first + len(weight)] * x
    return Promise(weight @ x + added, added.abs)


def magnitudes(update: LowRankUpdate, first: int, count: int) -> torch.Tensor:
    """The norms that the rows of W' shall have (DoRA)."""
    all_of_them = update.load()["lora_magnitude_vector"]
    return all_of_them if update.transposed else all_of_them[first : first + count]


def _first_factor(update: LowRankUpdate) -> torch.Tensor:
    factors = update.load()
    return factors["lora_A"] * factors["lora_E"] if "lora_E" in factors else factors["lora_A"]


def _scale(update: LowRankUpdate, rank: int) -> float:
    config = update.config
    if isinstance(config, AdaLoraConfig):
        return config.lora_alpha / (config.init_r + 1e-5)
    alpha = pattern_value(config.alpha_pattern, update.path, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
