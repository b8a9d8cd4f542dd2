"""A linear layer whose rows have different adapters, as one autograd function.

The product with W is made once for all rows; each term is added in place to the slice of rows that it acts on, and its
part of the input's gradient likewise. So many adapters cost what one does, but for the shorter products with A and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lowrank.ops.lora_linear import (
    Unpack,
    dropped,
    gradients_of_factors,
    kept_places,
    lora_linear_reference,
    under_autocast,
)
from lowrank.ops.low_rank import LowRank


@dataclass(frozen=True, slots=True)
class Part:
    """A term on some of the rows.

    Attributes:
        rows: A slice of the flattened input (n, in); no two parts overlap.
        term: What acts there.
        bias: What stands in the place of the layer's bias there (out,); that itself where the adapter leaves it.
        generator: What dropout draws from; None for torch's own.
    """

    rows: slice
    term: LowRank
    bias: torch.Tensor | None
    generator: torch.Generator | None = None


def routed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    parts: Sequence[Part],
    unpack: Unpack = torch.Tensor.to,
) -> torch.Tensor:
    """x·Wᵀ + b, with each part's term on its rows.

    Args:
        x: (..., in).
        weight: (out, in), frozen; or whatever `unpack` makes of it.
        bias: (out,) or None, frozen.
        parts: What acts on which of the rows; on all others the layer alone.
        unpack: For a weight that is stored in another form.

    Returns:
        (..., out), of x's dtype (under autocast: of the autocast dtype).
    """
    return under_autocast(_apply, x, weight, bias, parts, unpack)


def routed_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: Sequence[Part]
) -> torch.Tensor:
    """The same in plain operations, for (n, in), without dropout."""
    y = F.linear(x, weight, bias)
    for part in parts:
        y = y.clone()
        y[part.rows] = lora_linear_reference(x[part.rows], weight, part.bias, part.term)
    return y


@dataclass(frozen=True, slots=True)
class _Told:
    """What of a part is no tensor that gradients flow to; `own_bias`: its bias is not the layer's."""

    rows: slice
    scale: float
    dropout: float
    keep: torch.Tensor | None
    own_bias: bool


_EACH, _KEPT = 4, 6
"""Tensors that each part has (A, B, gain, bias), and that are kept of it (also x·Aᵀ, and the sum before the gain)."""


def _apply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: Sequence[Part], unpack: Unpack
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    told, tensors = [], []
    for part in parts:
        term = part.term
        own = part.bias is not bias
        keep = kept_places(rows[part.rows], term.dropout, part.generator)
        told.append(_Told(part.rows, term.scale, term.dropout, keep, own))
        tensors += [term.A, term.B, term.gain, part.bias if own else None]
    y = _RoutedLinear.apply(rows, weight, bias, unpack, told, *tensors)
    assert isinstance(y, torch.Tensor)
    return y.view(*x.shape[:-1], y.shape[-1])


class _RoutedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        unpack: Unpack,
        told: list[_Told],
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        dtype = rows.dtype
        each = _with_tensors(told, tensors)
        later = any(part.own_bias or gain is not None for part, _, _, gain, _ in each)  # a bias comes after the gain
        y = F.linear(rows, unpack(weight, dtype), None if bias is None or later else bias.to(dtype))
        if bias is not None and later:
            for rest in _without([part.rows for part in told], len(rows)):
                y[rest] += bias.to(dtype)
        kept: list[torch.Tensor | None] = []
        for part, A, B, gain, own in each:
            there = y[part.rows]
            A, B = A.to(dtype), B.to(dtype)
            low = dropped(rows[part.rows], part.keep, part.dropout) @ A.t()  # (m, r)
            there.addmm_(low, B.t(), alpha=part.scale)
            unscaled = None
            if gain is not None:
                unscaled = there.clone() if gain.requires_grad else None
                there *= gain.to(dtype)
            acting = own if part.own_bias else bias
            if acting is not None and later:
                there += acting.to(dtype)
            kept += [A, B, gain, own, low, unscaled]
        ctx.save_for_backward(rows, weight, *kept)
        ctx.told, ctx.unpack = told, unpack
        ctx.own = [(A.dtype, B.dtype) for _, A, B, _, _ in each]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        rows, weight, *kept = ctx.saved_tensors
        told, d_out = ctx.told, grads[0]
        d_y = d_out.clone() if any(gain is not None for gain in kept[2::_KEPT]) else d_out
        found: list[torch.Tensor | None] = []
        to_input = []
        for number, part in enumerate(told):
            A, B, gain, own, low, unscaled = kept[_KEPT * number :][:_KEPT]
            need = ctx.needs_input_grad[5 + _EACH * number :][:_EACH]
            d_there, outside = d_y[part.rows], d_out[part.rows]
            if gain is not None:
                d_there *= gain.to(d_y.dtype)
            d_low = (d_there @ B).mul_(part.scale)  # (m, r)
            taken = dropped(rows[part.rows], part.keep, part.dropout)
            found += gradients_of_factors(d_there, d_low, taken, low, A, B, part.scale, need[:2], ctx.own[number])
            found.append((outside * unscaled).sum(0, dtype=gain.dtype) if need[2] else None)
            found.append(outside.sum(0, dtype=own.dtype) if need[3] else None)
            to_input.append((part, d_low, A))
        d_x = _of_input(d_y, ctx.unpack(weight, d_y.dtype), to_input) if ctx.needs_input_grad[0] else None
        return d_x, None, None, None, None, *found


def _of_input(
    d_y: torch.Tensor, W: torch.Tensor, parts: Sequence[tuple[_Told, torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """The gradient of the rows (n, in), from that of the sums before a gain (n, out)."""
    d_x = d_y @ W
    for part, d_low, A in parts:
        if part.keep is None:
            d_x[part.rows].addmm_(d_low, A)
        else:
            d_x[part.rows] += dropped(d_low @ A, part.keep, part.dropout)
    return d_x


def _with_tensors(told: Sequence[_Told], tensors: Sequence[Any]) -> list[tuple[_Told, Any, Any, Any, Any]]:
    """Each part with its A, B, gain and own bias."""
    return [(part, *tensors[_EACH * i : _EACH * (i + 1)]) for i, part in enumerate(told)]


def _without(taken: Sequence[slice], n: int) -> list[slice]:
    """The stretches of n rows that none of these slices covers."""
    rest, start = [], 0
    for stretch in [*sorted(taken, key=lambda some: some.start), slice(n, n)]:
        if start < stretch.start:
            rest.append(slice(start, stretch.start))
        start = stretch.stop
    return rest
