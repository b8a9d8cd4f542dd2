"""What an update has to do to a parameter's products with a vector, worked out without the merged weight.

W' = gain · (W + s·B·A) gives W'x = gain · (Wx + s·B·(Ax)): two thin products, by a formula of the method that is said
apart from its term; and the experts' rows are picked one by one. Nothing is shared with what merges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch

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
    return _product(update, x)


@thin.register
def _(update: ExpertsUpdate, x: torch.Tensor) -> torch.Tensor:
    return update.load()[1].to(x.dtype) @ x


@promised.register
def _(update: LowRankUpdate, weight: torch.Tensor, x: torch.Tensor, first: int, low: torch.Tensor | None) -> Promise:
    columns, rows = slice(None), slice(first, first + len(weight))
    if update.transposed:
        columns, rows = slice(first, first + len(x)), slice(None)
        whole = x.new_zeros(update.matrix.into)
        whole[columns] = x
        hoped = torch.addmv(_product(update, whole), weight, x)
    else:
        assert low is not None
        hoped = torch.addmv(low[rows], weight, x)

    def terms() -> torch.Tensor:
        term = update.load().term
        A, B = term.A[:, columns].to(x.dtype), term.B[rows].to(x.dtype)
        return torch.linalg.vector_norm(B, dim=1) * (torch.linalg.vector_norm(A @ x) * abs(term.scale))

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
    """The norms that the rows of W' shall have, where the method says so (DoRA)."""
    all_of_them = update.method.row_norms(update.load().tensors)
    return all_of_them if update.transposed else all_of_them[first : first + count]


def _product(update: LowRankUpdate, x: torch.Tensor) -> torch.Tensor:
    """ΔW · x by the method's formula, which is written down apart from what merges."""
    return update.times * update.method.product(update.config, update.matrix, update.load().tensors, x)
