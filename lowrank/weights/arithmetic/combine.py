"""Ways to make one tensor of several: task arithmetic, TIES (Yadav 2023), DARE (Yu 2023), magnitude pruning.

They work on factors, A's with A's and B's with B's, as peft's `add_weighted_adapter` does. Only concatenation and the
singular value decomposition give the weighted sum of the adapters' ΔW; these are approximations with other aims.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

MajoritySign = Literal["total", "frequency"]
Combine = Callable[[Tensor, Tensor, float, MajoritySign, torch.Generator], Tensor]


def linear(tensors: Tensor, weights: Tensor, density: float, sign: MajoritySign, generator: torch.Generator) -> Tensor:
    """Σ wᵢ·Tᵢ.

    Args:
        tensors: (adapters, ...).
        weights: (adapters,).
        density: The share of values that pruning methods keep.
        sign: How TIES elects a sign: by the sum of the values, or by the number of tensors.
        generator: For DARE's random pruning.

    Returns:
        (...), the shape of one tensor.
    """
    return (tensors * _column(weights, tensors)).sum(0)


def magnitude_prune(
    tensors: Tensor, weights: Tensor, density: float, sign: MajoritySign, generator: torch.Generator
) -> Tensor:
    """The weighted sum of what is left after each tensor's smallest values are set to zero. See `linear`."""
    return linear(_largest(tensors, density), weights, density, sign, generator)


def dare_linear(
    tensors: Tensor, weights: Tensor, density: float, sign: MajoritySign, generator: torch.Generator
) -> Tensor:
    """The weighted sum of what is left after random values are dropped and the rest scaled up. See `linear`."""
    return linear(_dropped(tensors, density, generator), weights, density, sign, generator)


def ties(tensors: Tensor, weights: Tensor, density: float, sign: MajoritySign, generator: torch.Generator) -> Tensor:
    """Trim each tensor to its largest values, elect a sign per value, average those that agree. See `linear`."""
    return _elected(_largest(tensors, density), weights, sign)


def dare_ties(
    tensors: Tensor, weights: Tensor, density: float, sign: MajoritySign, generator: torch.Generator
) -> Tensor:
    """TIES with DARE's random dropping in the trimming's place. See `linear`."""
    return _elected(_dropped(tensors, density, generator), weights, sign)


FACTOR_METHODS: dict[str, Combine] = {
    "linear": linear,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}


def _elected(tensors: Tensor, weights: Tensor, sign: MajoritySign) -> Tensor:
    signs = tensors.sign()
    votes = tensors.sum(0) if sign == "total" else signs.sum(0)
    agrees = signs == torch.where(votes >= 0, 1, -1)
    return (tensors * _column(weights, tensors) * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _largest(tensors: Tensor, density: float) -> Tensor:
    if density >= 1:
        return tensors
    flat = tensors.flatten(1)
    keep = torch.topk(flat.abs(), int(density * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, keep, flat.gather(1, keep)).view(tensors.shape)


def _dropped(tensors: Tensor, density: float, generator: torch.Generator) -> Tensor:
    if density >= 1:
        return tensors
    kept = [torch.bernoulli(torch.full_like(tensor, density), generator=generator) for tensor in tensors]
    return tensors * torch.stack(kept) / density


def _column(weights: Tensor, tensors: Tensor) -> Tensor:
    return weights.view(-1, *[1] * (tensors.dim() - 1))
