"""Ways to make one tensor of several: task arithmetic, TIES (Yadav 2023), DARE (Yu 2023), magnitude pruning.

They work on factors, A's with A's and B's with B's, as peft's `add_weighted_adapter` does. Only concatenation and the
singular value decomposition give the weighted sum of the adapters' ΔW; these are approximations with other aims.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lowrank.weights.arithmetic.compose_methods import MajoritySign

Combine = Callable[[torch.Tensor, torch.Tensor, float, MajoritySign, torch.Generator], torch.Tensor]
"""Makes one tensor (...) of tensors (adapters, ...) and weights (adapters,); then what some ways need: the share of
values that pruning keeps, how TIES elects a sign (by the sum of the values, or by the number of tensors), and the
generator that DARE draws from."""


def _linear(
    tensors: torch.Tensor, weights: torch.Tensor, density: float, sign: MajoritySign, generator: torch.Generator
) -> torch.Tensor:
    """Σ wᵢ·Tᵢ."""
    return (tensors * _column(weights, tensors)).sum(0)


def _magnitude_prune(
    tensors: torch.Tensor, weights: torch.Tensor, density: float, sign: MajoritySign, generator: torch.Generator
) -> torch.Tensor:
    """The weighted sum of what is left after each tensor's smallest values are set to zero."""
    return _linear(_largest(tensors, density), weights, density, sign, generator)


def _dare_linear(
    tensors: torch.Tensor, weights: torch.Tensor, density: float, sign: MajoritySign, generator: torch.Generator
) -> torch.Tensor:
    """The weighted sum of what is left after random values are dropped and the rest scaled up."""
    return _linear(_dropped(tensors, density, generator), weights, density, sign, generator)


def _ties(
    tensors: torch.Tensor, weights: torch.Tensor, density: float, sign: MajoritySign, generator: torch.Generator
) -> torch.Tensor:
    """Trim each tensor to its largest values, elect a sign per value, average those that agree."""
    return _elected(_largest(tensors, density), weights, sign)


def _dare_ties(
    tensors: torch.Tensor, weights: torch.Tensor, density: float, sign: MajoritySign, generator: torch.Generator
) -> torch.Tensor:
    """TIES with DARE's random dropping in the trimming's place."""
    return _elected(_dropped(tensors, density, generator), weights, sign)


FACTOR_METHODS: dict[str, Combine] = {
    "linear": _linear,
    "ties": _ties,
    "dare_linear": _dare_linear,
    "dare_ties": _dare_ties,
    "magnitude_prune": _magnitude_prune,
}


def _elected(tensors: torch.Tensor, weights: torch.Tensor, sign: MajoritySign) -> torch.Tensor:
    signs = tensors.sign()
    votes = tensors.sum(0) if sign == "total" else signs.sum(0)
    agrees = signs == torch.where(votes >= 0, 1, -1)
    return (tensors * _column(weights, tensors) * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _largest(tensors: torch.Tensor, density: float) -> torch.Tensor:
    if density >= 1:
        return tensors
    flat = tensors.flatten(1)
    keep = torch.topk(flat.abs(), int(density * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, keep, flat.gather(1, keep)).view(tensors.shape)


def _dropped(tensors: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    if density >= 1:
        return tensors
    kept = [torch.bernoulli(torch.full_like(tensor, density), generator=generator) for tensor in tensors]
    return tensors * torch.stack(kept) / density


def _column(weights: torch.Tensor, tensors: torch.Tensor) -> torch.Tensor:
    return weights.view(-1, *[1] * (tensors.dim() - 1))
