"""The leading singular directions of a dense matrix, by random projections (Halko, Martinsson, Tropp 2011)."""

from __future__ import annotations

import torch

from lowrank.weights.arithmetic.factors import Product, rank_for

_EXTRA, _ROUNDS = 10, 4  # more directions than wanted, and passes that sharpen them


def leading(matrix: torch.Tensor, rank: int | None, energy: float | None, seed: int) -> tuple[Product, float]:
    """The nearest product of low rank, and the share of ‖matrix‖² that it keeps.

    Args:
        matrix: (out, in), float32, not zero.
        rank: How many directions at most; None for as many as `energy` needs.
        energy: The share of ‖matrix‖² to keep, with as few directions as that takes; None for `rank` of them.
        seed: Of the random projection.
    """
    whole = torch.linalg.vector_norm(matrix, dtype=torch.float64).square().item()
    full = min(matrix.shape)
    tried = min(rank or 32, full)
    while True:
        U, S, Vh = _decomposed(matrix, tried, seed)
        kept = S.double().square().cumsum(0) / whole
        if energy is None or tried >= min(rank or full, full) or (energy < 1 and kept[-1] >= energy):
            break
        tried = min(2 * tried, rank or full, full)
    keep = len(S) if energy is None else _enough(kept, energy)
    keep = min(keep, rank_for(S, rank, None))
    return Product(Vh[:keep].contiguous(), U[:, :keep] * S[:keep]), min(1.0, kept[keep - 1].item())


def _enough(kept: torch.Tensor, energy: float) -> int:
    return len(kept) if energy >= 1 else min(len(kept), int((kept < energy).sum()) + 1)


def _decomposed(matrix: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = rank + _EXTRA
    if 2 * width >= min(matrix.shape):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        Q = matrix @ torch.randn(matrix.shape[1], width, generator=generator)
        for _ in range(_ROUNDS):
            Q = torch.linalg.qr(matrix.T @ torch.linalg.qr(Q).Q).Q
            Q = matrix @ Q
        Q = torch.linalg.qr(Q).Q
        U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
        U = Q @ U
    return U[:, :rank], S[:rank], Vh[:rank]
