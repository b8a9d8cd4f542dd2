"""PiSSA (Meng 2024): the factors begin as the leading singular directions of the base weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lowrank.adapters.kinds.kind import HostModule, Kind
from lowrank.errors import InputError

if TYPE_CHECKING:
    from lowrank.adapters.methods.lora import LoraLayer


def pissa(layer: LoraLayer, module: HostModule, kind: Kind, iterations: int | None = None) -> None:
    """s · B · A = the best rank-r approximation of W, split evenly: B = U√S / √s, A = √S·Vᵀ / √s.

    Args:
        layer: What is filled.
        module: The module it is for.
        kind: The module's kind.
        iterations: None for the exact decomposition, else the power iterations of the randomised one (Halko 2011).

    Raises:
        InputError: r is above the smaller side of W.
    """
    r = rank_within("pissa", layer, kind.shape(module))
    weight = kind.weight(module).to(layer.lora_A.dtype)
    if iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    else:
        U, S, V = torch.svd_lowrank(weight, r, niter=iterations)
        Vh = V.t()
    root = (S / layer.scale).sqrt()
    start_from(layer, A=root[:, None] * Vh, B=U * root)


def rank_within(how: str, layer: LoraLayer, shape: tuple[int, int]) -> int:
    """The layer's rank. Raises InputError if a matrix of that shape has fewer directions to begin with."""
    r = layer.lora_A.shape[0]
    if r > min(shape):
        raise InputError(
            f"init_lora_weights: {how} takes {r} directions of a weight, and one of shape {shape} has {min(shape)}",
            fix="Lower r, or give those modules a rank of their own in rank_pattern.",
        )
    return r


def start_from(layer: LoraLayer, A: torch.Tensor, B: torch.Tensor) -> None:
    """Begins at A and B, and subtracts what they stand for."""
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)
    layer.start_A = layer.lora_A.detach().clone()
    layer.start_B = layer.lora_B.detach().clone()
