"""Low-rank products worked with through their factors: norms, differences, truncation; never a dense ΔW.

Throughout, ΔW = B · A with B (out, r) and A (r, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.errors import InputError


@dataclass(frozen=True, slots=True)
class Product:
    """ΔW = B · A, the scale folded in."""

    A: torch.Tensor
    B: torch.Tensor

    @property
    def rank(self) -> int:
        """The number of rows of A; the matrix's rank is at most that."""
        return self.A.shape[0]

    def times(self, weight: float) -> Product:
        """weight · ΔW, the weight folded into A."""
        return Product(self.A * weight, self.B)


def padded(product: Product, rank: int) -> Product:
    """The same at a higher rank: rows and columns of zeros follow."""
    missing = rank - product.rank
    A = torch.nn.functional.pad(product.A, (0, 0, 0, missing))
    return Product(A, torch.nn.functional.pad(product.B, (0, missing)))


def check_limits(rank: int | None, energy: float | None) -> None:
    """Raises InputError for a rank or an energy to keep that there is not; None is not asked for."""
    if rank is not None and rank < 1:
        raise InputError(f"the rank is {rank}; it is at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"the energy is {energy}; it is above 0 and at most 1")


def rank_fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    """LoRA's fields for modules of these ranks, at scale 1: the commonest rank, and the others as patterns.

    Args:
        ranks: By path; not none.
    """
    common = max(ranks.values(), key=list(ranks.values()).count)
    others = {path: rank for path, rank in ranks.items() if rank != common}
    alphas = {path: float(rank) for path, rank in others.items()}
    return {"r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": alphas}


def total(products: list[Product]) -> Product:
    """The sum, exactly: A below A, B beside B; ranks add."""
    return Product(torch.cat([p.A for p in products]), torch.cat([p.B for p in products], dim=1))


def norm(product: Product) -> float:
    """‖B·A‖ (Frobenius), as √tr((BᵀB)(AAᵀ)) in float64."""
    A, B = product.A.double(), product.B.double()
    return ((B.T @ B) * (A @ A.T)).sum().clamp_min(0.0).sqrt().item()


def distance(one: Product, other: Product) -> float:
    """‖B₁·A₁ - B₂·A₂‖, through the singular values: the terms of a squared norm would cancel."""
    return torch.linalg.vector_norm(singular(total([one, other.times(-1.0)]))[1]).item()


def singular(product: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reduced singular value decomposition of B·A, from QR decompositions of the factors, in float64.

    B = Q₁R₁ and Aᵀ = Q₂R₂, so B·A = Q₁(R₁R₂ᵀ)Q₂ᵀ, and the matrix in the middle is only (r, r).

    Returns:
        U (out, k), S (k,) descending, Vh (k, in) with k = min(r, out, in).
    """
    Q1, R1 = torch.linalg.qr(product.B.double())
    Q2, R2 = torch.linalg.qr(product.A.double().T)
    U, S, Vh = torch.linalg.svd(R1 @ R2.T, full_matrices=False)
    return Q1 @ U, S, Vh @ Q2.T


def rank_for(S: torch.Tensor, rank: int | None, energy: float | None) -> int:
    """How many singular values to keep: `rank`, or the fewest that hold `energy` of ΣS²; at least 1, at most both."""
    keep = len(S) if rank is None else min(rank, len(S))
    if energy is not None:
        share = S.square().cumsum(0) / S.square().sum().clamp_min(torch.finfo(S.dtype).tiny)
        keep = min(keep, int((share < energy - 1e-12).sum()) + 1)
    return max(1, keep)


def truncated(product: Product, rank: int | None, energy: float | None = None) -> Product:
    """The nearest product of a lower rank: B = U·S and A = Vh (as peft's `svd`), in float32."""
    U, S, Vh = singular(product)
    keep = rank_for(S, rank, energy)
    return Product(Vh[:keep].float(), (U[:, :keep] * S[:keep]).float())
