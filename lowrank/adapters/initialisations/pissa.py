"""PiSSA (Meng 2024): the factors begin as the leading singular directions of the base weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lowrank.adapters.kinds import HostModule, Kind

if TYPE_CHECKING:
    from lowrank.adapters.lora import LoraLayer


def pissa(layer: LoraLayer, module: HostModule, kind: Kind, iterations: int | None = None) -> None:
    """s · B · A = the best rank-r approximation of W, split evenly: B = U√S / √s, A = √S·Vᵀ / √s.

    Args:
        layer: What is filled.
        module: The module it is for.
        kind: The module's kind.
        iterations: None for the exact decomposition, else the power iterations of the randomised one (Halko 2011).
    """
    weight = kind.weight(module).to(layer.lora_A.dtype)
    r = layer.lora_A.shape[0]
    if iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    else:
        U, S, V = torch.svd_lowrank(weight, r, niter=iterations)
        Vh = V.t()
    root = (S / layer.scale).sqrt()
    start_from(layer, A=root[:, None] * Vh, B=U * root)


def start_from(layer: LoraLayer, A: torch.Tensor, B: torch.Tensor) -> None:
    """Begins at A and B, and subtracts what they stand for."""
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)
    layer.start_A = layer.lora_A.detach().clone()
    layer.start_B = layer.lora_B.detach().clone()
