"""y = x / √(mean x² + ε) · gain as one autograd function (RMSNorm, Zhang and Sennrich 2019).

Composed of plain operations it keeps a float32 copy of x and the normed x besides, and its backward pass goes over the
rows twenty times. Here that pass needs x, which is there anyway, and a number for each row, and goes over them nine
times; on a card where `kernels` run it is one launch, as the forward pass is.
"""

from __future__ import annotations

from typing import Any

import torch

from lowrank.ops.kernels.on_card import WIDEST, kernels_take
from lowrank.ops.made_again import can_be_made
from lowrank.ops.precision import precise


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, rounded_first: bool, one_plus: bool = False
) -> torch.Tensor:
    """Normed over the last dimension, in float32 at least.

    Args:
        x: (..., d).
        weight: (d,), the gain.
        eps: ε.
        rounded_first: The normed x is rounded to x's dtype before it is multiplied (as in Llama), not after (Gemma).
        one_plus: The gain is 1 + weight, in float32 (as in Gemma).

    Returns:
        (..., d); rounded first, of the dtype that x and the gain promote to, else of x's.
    """
    if kernels_take(x, weight) and x.shape[-1] <= WIDEST:
        from lowrank.ops.kernels.norm_rows import norm_rows

        return norm_rows(x, weight, eps, rounded_first, one_plus)
    gain = 1.0 + weight.float() if one_plus else weight
    y, scale = _RmsNorm.apply(x, gain, eps, rounded_first)
    return can_be_made(y, lambda x, gain, scale: _normed(x, gain, scale, rounded_first), x, gain, scale)


def rms_norm_reference(x: torch.Tensor, gain: torch.Tensor, eps: float, rounded_first: bool) -> torch.Tensor:
    """The same in plain operations."""
    precise_x = x.to(precise(x.dtype))
    normed = precise_x * torch.rsqrt(precise_x.square().mean(-1, keepdim=True) + eps)
    return gain * normed.to(x.dtype) if rounded_first else (normed * gain.to(normed.dtype)).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gain: torch.Tensor, eps: float, rounded_first: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.to(precise(x.dtype)).square().mean(-1, keepdim=True)  # a vector norm rounds ten times worse
        scale.add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        ctx.mark_non_differentiable(scale)
        return _normed(x, gain, scale, rounded_first), scale

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gain, scale = ctx.saved_tensors
        d_y, precise_x = grads[0].to(scale.dtype), x.to(scale.dtype)
        d_gain = None
        if ctx.needs_input_grad[1]:
            d_gain = (d_y * precise_x).mul_(scale).flatten(0, -2).sum(0).to(gain.dtype)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = d_y * gain
            along = (d_x * precise_x).sum(-1, keepdim=True).mul_(scale**3).div_(-x.shape[-1])
            d_x = d_x.mul_(scale).addcmul_(precise_x, along).to(x.dtype)
        return d_x, d_gain, None, None


def _normed(x: torch.Tensor, gain: torch.Tensor, scale: torch.Tensor, rounded_first: bool) -> torch.Tensor:
    normed = x.to(scale.dtype) * scale
    return gain * normed.to(x.dtype) if rounded_first else normed.mul_(gain).to(x.dtype)
