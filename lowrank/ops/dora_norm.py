"""‖W + s·B·A‖, row by row, without forming B·A (DoRA, Liu 2024, equation 5)."""

from __future__ import annotations

import torch


def dora_norm(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    weight_norm2: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm of each row of W + s·B·A: ‖wᵢ + s·bᵢA‖² = ‖wᵢ‖² + 2s·bᵢ·(A·wᵢ) + s²·bᵢ·(A·Aᵀ)·bᵢᵀ.

    The products are (out, r) and (r, r). Sums are in float32 (float64 for float64 factors): with a bf16 W the products
    are W's own.

    Args:
        weight: W (out, in), dense.
        A: (r, in).
        B: (out, r).
        scale: s.
        weight_norm2: ‖wᵢ‖² (out,) where it is known already.

    Returns:
        (out,), the dtype of A.
    """
    norm2 = row_norm2(weight, A.dtype) if weight_norm2 is None else weight_norm2
    cross = (weight @ A.to(weight.dtype).t()).to(B.dtype)  # (out, r)
    square = (B @ (A @ A.t())).mul_(scale * scale).add_(cross, alpha=2.0 * scale)
    return (norm2 + (square * B).sum(1)).clamp_min_(0.0).sqrt_()


def row_norm2(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """‖wᵢ‖² of every row, (out,), summed in `dtype`."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square_()


def dora_norm_reference(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """The same with the dense sum."""
    return torch.linalg.vector_norm(weight + scale * (B @ A), dim=1)
