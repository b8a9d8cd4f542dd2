"""y = x·Wᵀ + b with W stored in fewer bits than x has: W is widened for each product, and not kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def wide_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer whose frozen weight is of another dtype than its input.

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        bias: (out,) or None; of x's dtype.

    Returns:
        (..., out), of x's dtype.
    """
    y = _WideProduct.apply(x, weight)
    assert isinstance(y, torch.Tensor)
    return y if bias is None else y + bias


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyrefly: ignore[bad-override]
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.to(grads[0].dtype), None
