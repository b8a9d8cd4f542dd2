"""Adapted linear layers that are given the very same input, as one autograd function.

Against one function each (`ops.lora_linear`) the input is read once for all their low-rank terms, whose A are stacked,
and its gradient is summed in place, product by product, instead of by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lowrank.ops.low_rank import LowRank


@dataclass(frozen=True)
class Projection:
    """One of the layers.

    Attributes:
        weight: (out, in), frozen.
        bias: (out,), frozen, or None.
        term: Its low-rank term, without gain and dropout, whose factors both train.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    term: LowRank


def lora_linears(x: torch.Tensor, projections: Sequence[Projection]) -> list[torch.Tensor]:
    """x·Wᵀ + s · x·Aᵀ·Bᵀ + b of each.

    Args:
        x: (..., in).
        projections: Of one dtype of A.

    Returns:
        (..., out) for each, of x's dtype.
    """
    of = [tensor for each in projections for tensor in (each.weight, each.term.A, each.term.B)]
    scales, biases = [each.term.scale for each in projections], [each.bias for each in projections]
    ys = _LoraLinears.apply(x.reshape(-1, x.shape[-1]), scales, biases, *of)
    assert isinstance(ys, tuple)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, scales: list[float], biases: list[torch.Tensor | None], *of: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        weights, As, Bs = of[::3], of[1::3], of[2::3]
        A, ranks = torch.cat(As).to(rows.dtype), [len(A) for A in As]  # (all ranks, in)
        low = rows @ A.t()  # (n, all ranks)
        ys, cast = [], [B.to(rows.dtype) for B in Bs]
        for W, bias, B, part, scale in zip(weights, biases, cast, low.split(ranks, dim=1), scales, strict=True):
            y = F.linear(rows, W.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
            ys.append(y.addmm_(part, B.t(), alpha=scale))
        ctx.save_for_backward(rows, low, A, *weights, *cast)
        ctx.scales, ctx.ranks, ctx.own = scales, ranks, (As[0].dtype, [B.dtype for B in Bs])
        return tuple(ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_ys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        rows, low, A, *of = ctx.saved_tensors
        weights, Bs = of[: len(d_ys)], of[len(d_ys) :]
        own_A, own_B = ctx.own
        d_low, d_Bs = torch.empty_like(low), []
        parts, d_parts = (each.split(ctx.ranks, dim=1) for each in (low, d_low))
        for d_y, B, part, d_part, scale, dtype in zip(d_ys, Bs, parts, d_parts, ctx.scales, own_B, strict=True):
            torch.addmm(d_part, d_y, B, beta=0, alpha=scale, out=d_part)
            d_Bs.append((d_y.t() @ part).mul_(scale).to(dtype))
        d_As = (d_low.t() @ rows).to(own_A).split(ctx.ranks)
        d_rows = None
        if ctx.needs_input_grad[0]:
            d_rows = d_ys[0] @ weights[0].to(rows.dtype)
            for d_y, W in zip(d_ys[1:], weights[1:], strict=True):
                d_rows.addmm_(d_y, W.to(rows.dtype))
            d_rows.addmm_(d_low, A)
        d_of = (each for d_A, d_B in zip(d_As, d_Bs, strict=True) for each in (None, d_A, d_B))
        return d_rows, None, None, *d_of
