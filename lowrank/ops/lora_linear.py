"""y = gain · (x·Wᵀ + s · drop(x)·Aᵀ·Bᵀ) + b as one autograd function (LoRA, Hu 2021, equation 3).

Against the plain composition it keeps no second input, no cast copy of x and no (n, out) intermediate: the low-rank
terms are added in place to the products with W, and the backward pass needs x, the (n, r) product x·Aᵀ, the weights,
and A and B in the dtype of the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from lowrank.ops.low_rank import LowRank

Unpack: TypeAlias = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
"""Gives the matrix (out, in), in a dtype, that a stored weight stands for."""


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    term: LowRank,
    unpack: Unpack = torch.Tensor.to,
) -> torch.Tensor:
    """The adapted linear layer.

    Args:
        x: (..., in).
        weight: (out, in), frozen or not; or whatever `unpack` makes of it, frozen.
        bias: (out,) or None.
        term: The low-rank term; its factors may be of another dtype than x, which they are then cast to.
        unpack: For a weight that is stored in few bits; it is unpacked for each product, and not kept.

    Returns:
        (..., out), of x's dtype (under autocast: of the autocast dtype).
    """
    return under_autocast(_apply, x, weight, bias, term, unpack)


def under_autocast(apply: Callable[..., torch.Tensor], x: torch.Tensor, *others: Any) -> torch.Tensor:
    """apply(x, *others); under autocast with x in its dtype, and without what it would do inside."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return apply(x.to(dtype), *others)
    return apply(x, *others)


def lora_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    term: LowRank,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain operations; `keep` (..., in) holds 0 where dropout drops and 1 / (1 - p) elsewhere."""
    dropped = x if keep is None else x * keep
    y = F.linear(x, weight.to(x.dtype)) + term.scale * F.linear(F.linear(dropped, term.A), term.B)
    y = y if term.gain is None else y * term.gain
    return y if bias is None else y + bias


def _apply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, term: LowRank, unpack: Unpack
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    keep = kept_places(rows, term.dropout)
    y = _LoraLinear.apply(rows, weight, bias, term.A, term.B, term.gain, keep, term.scale, term.dropout, unpack)
    assert isinstance(y, torch.Tensor)
    return y.view(*x.shape[:-1], y.shape[-1])  # here, not inside: models add to the output in place (Llama 4)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        A: torch.Tensor,
        B: torch.Tensor,
        gain: torch.Tensor | None,
        keep: torch.Tensor | None,
        scale: float,
        dropout: float,
        unpack: Unpack,
    ) -> torch.Tensor:
        W = unpack(weight, rows.dtype)
        A, B, own = A.to(rows.dtype), B.to(rows.dtype), (A.dtype, B.dtype)
        low = dropped(rows, keep, dropout) @ A.t()  # (n, r)
        y = F.linear(rows, W, None if bias is None or gain is not None else bias.to(rows.dtype))
        y.addmm_(low, B.t(), alpha=scale)
        unscaled = None
        if gain is not None:
            unscaled = y if gain.requires_grad else None
            y = y * gain.to(rows.dtype)
            if bias is not None:
                y += bias.to(rows.dtype)
        ctx.save_for_backward(rows, weight, A, B, gain, keep, low, unscaled)
        ctx.scale, ctx.dropout, ctx.unpack, ctx.own = scale, dropout, unpack, own
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, A, B, gain, keep, low, unscaled = ctx.saved_tensors
        need = ctx.needs_input_grad
        d_out = grads[0]
        d_bias = d_out.sum(0) if need[2] else None
        d_gain = (d_out * unscaled).sum(0, dtype=gain.dtype) if need[5] else None
        d_y = d_out if gain is None else d_out * gain.to(d_out.dtype)
        d_low = d_y @ B  # (n, r)
        d_low *= ctx.scale
        taken = dropped(rows, keep, ctx.dropout)
        d_A, d_B = gradients_of_factors(d_y, d_low, taken, low, A, B, ctx.scale, (need[3], need[4]), ctx.own)
        d_weight = (d_y.t() @ rows).to(weight.dtype) if need[1] else None
        d_x = None
        if need[0]:
            d_x = d_y @ ctx.unpack(weight, d_y.dtype)
            if keep is None:
                d_x.addmm_(d_low, A)
            else:
                d_x += dropped(d_low @ A, keep, ctx.dropout)
        return d_x, d_weight, d_bias, d_A, d_B, d_gain, None, None, None, None


def gradients_of_factors(
    d_y: torch.Tensor,
    d_low: torch.Tensor,
    taken: torch.Tensor,
    low: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    need: tuple[bool, bool],
    own: tuple[torch.dtype, torch.dtype],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of A and B.

    Args:
        d_y: Of the sum before a gain, (n, out).
        d_low: Of x·Aᵀ, (n, r).
        taken: What A was multiplied with, (n, in).
        low: x·Aᵀ.
        A, B, scale: Of the term, A and B in the dtype of the products.
        need: Whether A's is wanted, and whether B's is.
        own: The dtypes of A and B where they train.
    """
    d_A = d_B = None
    if need[0] and need[1] and wide(A, B, len(taken)):
        d_product = d_y.t() @ taken  # (out, in), of scale · B · A
        d_product *= scale
        d_A, d_B = B.t() @ d_product, d_product @ A.t()
    else:
        d_A = d_low.t() @ taken if need[0] else None
        d_B = (d_y.t() @ low).mul_(scale) if need[1] else None
    return (None if d_A is None else d_A.to(own[0])), (None if d_B is None else d_B.to(own[1]))


def wide(A: torch.Tensor, B: torch.Tensor, n: int) -> bool:
    """Whether the gradient of B · A costs less than n rows through the rank (RunLoRA, Cherniuk 2023)."""
    (r, width), out = A.shape, B.shape[0]
    if r * (width + out) <= width * out:  # for every n; said apart, so that what is compiled need not know n
        return False
    return n * r * (width + out) > (n + 2 * r) * width * out


def kept_places(rows: torch.Tensor, dropout: float, generator: torch.Generator | None = None) -> torch.Tensor | None:
    """Which inputs dropout leaves, drawn anew; None where it is 0."""
    if not dropout:
        return None
    return torch.empty_like(rows, dtype=torch.bool).bernoulli_(1.0 - dropout, generator=generator)


def dropped(rows: torch.Tensor, keep: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """The rows that go to A."""
    if keep is None:
        return rows
    return rows * keep * (1.0 / (1.0 - dropout))
